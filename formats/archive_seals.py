"""How sealed archives of vmfold, version 1, are opened: keyrings, X-Wing, epoch keys, seals of records, signatures of commits.

It was written from encryption-v1.md alone, and from what that names: the age format (c2sp.org/age), FIPS 203 (ML-KEM), the X-Wing draft 06, RFC 8032. It
is a part of read_archive.py, and knows nothing of files. Nothing here runs in constant time: it is a check of a text, and no place for keys of value.
It needs `blake3` from PyPI and, once an archive is sealed, `cryptography`.
"""
import base64, functools, hashlib, hmac, itertools, re, struct
from archive_payloads import COMMIT, KIB, PACK, Cursor, Damaged, Unsupported, must, refuse
from blake3 import blake3

DATA, METADATA, INDEXES = 1, 2, 3
TAG, SALT, PAIR, WRAPPED, SIGNATURE = 16, 16, 8, 1168, 64
# Of the clear part of a sealed COMMIT: where the signature is, where the keys of the epoch are, and where ends what is known of it.
SIGNED_AT, KEYS_AT, CLEAR = 116, 116 + SIGNATURE, 116 + SIGNATURE + PAIR + 2 * WRAPPED
KEY_LENGTHS, KEYRING_AT, KEYRING_MOST, SLOT_MOST = (16 * KIB, 32 * KIB, 64 * KIB), 2356, 48 * KIB, 8192
WORK_FACTOR = 18
PRIME = 2**255 - 19


class Locked(Exception):
    """No key opens the archive, or what is needed to use a key is not there."""


def needed():
    """What of `cryptography` is used. Only a sealed archive needs it."""
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
        from cryptography.hazmat.primitives.ciphers import aead
    except ImportError as missing:
        raise Locked(f"the archive is sealed, and to open it {missing.name} is needed: pip install cryptography") from None
    return exceptions, ed25519, x25519, aead


def derive(context, material):
    return blake3(material, derive_key_context=context).digest()


def unseal(cipher, key, nonce, sealed, associated, what):
    """What a seal of AES-256-GCM or ChaCha20-Poly1305 holds."""
    exceptions, _, _, aead = needed()
    must(len(sealed) >= TAG, f"{what} is shorter than its tag")
    try:
        return getattr(aead, cipher)(key).decrypt(nonce, sealed, associated)
    except exceptions.InvalidTag:
        raise Damaged(f"{what} does not open") from None


def exchange(secret, public):
    """X25519. Of a point of small order it is zeros."""
    x25519 = needed()[2]
    try:
        return x25519.X25519PrivateKey.from_private_bytes(secret).exchange(x25519.X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return bytes(32)


# ML-KEM-768, as FIPS 203 has it. A polynomial is a list of 256 numbers below Q.
Q, N, K = 3329, 256, 3
ZETAS = [pow(17, int(f"{number:07b}"[::-1], 2), Q) for number in range(128)]
GAMMAS = [pow(17, 2 * int(f"{number:07b}"[::-1], 2) + 1, Q) for number in range(128)]


def ntt(poly):
    poly, zeta, length = list(poly), 1, 128
    while length >= 2:
        for start in range(0, N, 2 * length):
            for at in range(start, start + length):
                other = ZETAS[zeta] * poly[at + length]
                poly[at], poly[at + length] = (poly[at] + other) % Q, (poly[at] - other) % Q
            zeta += 1
        length //= 2
    return poly


def ntt_back(poly):
    poly, zeta, length = list(poly), 127, 2
    while length <= 128:
        for start in range(0, N, 2 * length):
            for at in range(start, start + length):
                low, high = poly[at], poly[at + length]
                poly[at], poly[at + length] = (low + high) % Q, ZETAS[zeta] * (high - low) % Q
            zeta -= 1
        length *= 2
    return [one * 3303 % Q for one in poly]


def dot(left, right):
    """The sum of products of polynomials that the NTT has transformed."""
    result = [0] * N
    for a, b in zip(left, right):
        for at in range(0, N, 2):
            a0, a1, b0, b1 = a[at], a[at + 1], b[at], b[at + 1]
            result[at] += a0 * b0 + a1 * b1 % Q * GAMMAS[at // 2]
            result[at + 1] += a0 * b1 + a1 * b0
    return [one % Q for one in result]


def add(*polys):
    return [sum(those) % Q for those in zip(*polys)]


def encode(poly, bits):
    return sum(one << bits * at for at, one in enumerate(poly)).to_bytes(32 * bits, "little")


def decode(data, bits):
    """The polynomials of which each number takes so many bits."""
    numbers = int.from_bytes(data, "little")
    flat = [numbers >> bits * at & (1 << bits) - 1 for at in range(len(data) * 8 // bits)]
    return [flat[at : at + N] for at in range(0, len(flat), N)]


def compress(poly, bits):
    return [((one << bits + 1) + Q) // (2 * Q) % (1 << bits) for one in poly]


def decompress(poly, bits):
    return [(one * Q * 2 + (1 << bits)) >> bits + 1 for one in poly]


def uniform(seed, row, column):
    """An element of the matrix, by rejection."""
    result, length = [], 0
    while len(result) < N:
        length += 840
        stream = hashlib.shake_128(seed + bytes([column, row])).digest(length)
        triples = (stream[at : at + 3] for at in range(0, length, 3))
        both = ((one[0] | (one[1] & 15) << 8, one[1] >> 4 | one[2] << 4) for one in triples)
        result = [one for one in itertools.chain(*both) if one < Q]
    return result[:N]


def binomial(seed, number):
    stream = int.from_bytes(hashlib.shake_256(seed + bytes([number])).digest(128), "little")
    fours = (stream >> 4 * at & 15 for at in range(N))
    return [((one & 1) + (one >> 1 & 1) - (one >> 2 & 1) - (one >> 3)) % Q for one in fours]


@functools.lru_cache(128)
def mlkem_pair(seed, rejected):
    """Public key and secret polynomials from the two seeds of KeyGen_internal, with the matrix and what is rejected with."""
    rho, sigma = split(hashlib.sha3_512(seed + bytes([K])).digest(), 32, 32)
    matrix = [[uniform(rho, row, column) for column in range(K)] for row in range(K)]
    secret = [ntt(binomial(sigma, number)) for number in range(K)]
    public = [add(dot(matrix[row], secret), ntt(binomial(sigma, K + row))) for row in range(K)]
    return b"".join(encode(one, 12) for one in public) + rho, secret, public, matrix, rejected


def mlkem_decapsulate(pair, ciphertext):
    """The shared secret. For a ciphertext that nobody encapsulated it is another one, and no error (implicit rejection)."""
    encoded, secret, public, matrix, rejected = pair
    u, (v,) = decode(ciphertext[:960], 10), decode(ciphertext[960:], 4)
    masked = ntt_back(dot(secret, [ntt(decompress(one, 10)) for one in u]))
    message = encode(compress([(a - b) % Q for a, b in zip(decompress(v, 4), masked)], 1), 1)
    shared, random = split(hashlib.sha3_512(message + hashlib.sha3_256(encoded).digest()).digest(), 32, 32)
    y = [ntt(binomial(random, number)) for number in range(K)]
    again = [add(ntt_back(dot([row[at] for row in matrix], y)), binomial(random, K + at)) for at in range(K)]
    tail = add(ntt_back(dot(public, y)), binomial(random, 2 * K), decompress(decode(message, 1)[0], 1))
    same = b"".join(encode(compress(one, 10), 10) for one in again) + encode(compress(tail, 4), 4) == ciphertext
    return shared if same else hashlib.shake_256(rejected + ciphertext).digest(32)


def split(data, *lengths):
    at = [0, *itertools.accumulate(lengths)]
    return [data[first:end] for first, end in zip(at, at[1:])]


@functools.lru_cache(128)
def xwing_pair(seed):
    """From a seed of 32 bytes: public key; pair of ML-KEM; secret and public key of X25519."""
    needed()
    first, rejected, secret = split(hashlib.shake_256(seed).digest(96), 32, 32, 32)
    pair, public = mlkem_pair(first, rejected), exchange(secret, (9).to_bytes(32, "little"))
    return pair[0] + public, pair, secret, public


def xwing_decapsulate(seed, ciphertext):
    _, pair, secret, public = xwing_pair(seed)
    lattice, curve = split(ciphertext, 1088, 32)
    return hashlib.sha3_256(mlkem_decapsulate(pair, lattice) + exchange(secret, curve) + curve + public + rb"\.//^" + b"\\").digest()


def small_order(point):
    """Whether this is the encoding, of whatever form, of a point of Ed25519 whose order is 8 or less."""
    y = (int.from_bytes(point, "little") & 2**255 - 1) % PRIME
    d = -121665 * pow(121666, -1, PRIME)
    # The order divides 2 where x is 0; 4 where y is; and 8 where twice the point has y = 0, which is 2 y^2 = 1 + d x^2 y^2, with x^2 = -y^2.
    return y in (0, 1, PRIME - 1) or (d * pow(y, 4, PRIME) + 2 * y * y - 1) % PRIME == 0


def signed(public, signature, message):
    exceptions, ed25519, _, _ = needed()
    if small_order(public) or small_order(signature[:32]):
        return False
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        return True
    except (exceptions.InvalidSignature, ValueError):
        return False


def public_key(seed):
    return needed()[1].Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def unbech32(text, prefix):
    """The 32 bytes of a Bech32 string, or None. What is easily mistaken on paper is taken for what it must be."""
    values = ["qpzry9x8gf2tvdw0s3jn54khce6mua7l".find(one) for one in text.lower().translate(str.maketrans("oi1b", "0ll8"))]
    check = 1
    for value in [ord(one) >> 5 for one in prefix] + [0] + [ord(one) & 31 for one in prefix] + values:
        top, check = check >> 25, (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator * (top >> bit & 1)
    number = functools.reduce(lambda all_, one: all_ << 5 | one, values[:-6], 0)
    return (number >> 4).to_bytes(32, "big") if -1 not in values and check == 1 and len(values) == 58 and not number & 15 else None


def identities(text):
    """The secrets of a file of identities of age, typed or printed however."""
    if text.startswith(("age-encryption.org/", "-----BEGIN AGE")):
        raise Locked("a file of identities is encrypted; decrypt it first: age -d")
    lines = (line for line in text.splitlines() if not line.lstrip().upper().startswith(("#", "AGE-PLUGIN-")))
    joined = re.sub(r"[\s-]", "", "".join(lines)).upper()
    secrets = [unbech32(one, "age-secret-key-") for one in joined.split("AGESECRETKEY1")[1:]]
    if not secrets or None in secrets or not joined.startswith("AGESECRETKEY1"):
        raise Locked("a file of identities has none that this reader knows, or one that is mistyped")
    return secrets


def hkdf(material, salt, info):
    """32 bytes of HKDF-SHA-256."""
    return hmac.digest(hmac.digest(salt or bytes(32), material, "sha256"), info + b"\x01", "sha256")


def unbase64(text):
    data = base64.b64decode(text + b"=" * (-len(text) % 4)) if re.fullmatch(rb"[A-Za-z0-9+/]*", text) and len(text) % 4 != 1 else b""
    must(base64.b64encode(data).rstrip(b"=") == text, "the base64 of a slot is wrong")
    return data


class Slot:
    """A file of age, version 1, with its stanzas."""

    def __init__(self, data):
        self.data, self.at, self.stanzas = data, 0, []
        must(self.line() == b"age-encryption.org/v1", "a slot is no file of age")
        while (line := self.line()).startswith(b"-> "):
            arguments, body = line[3:].split(b" "), [self.line()]
            must(all(re.fullmatch(rb"[!-~]+", one) for one in arguments), "a stanza of a slot is wrong")
            while len(body[-1]) == 64:
                body.append(self.line())
            must(len(body[-1]) < 64, "a line of a slot is too long")
            self.stanzas.append((*arguments, unbase64(b"".join(body))))
        must(line.startswith(b"--- ") and self.stanzas, "a slot has no stanza, or no MAC")
        self.header, self.mac = data[: self.at - len(line) + 2], unbase64(line[4:])
        must(len(self.mac) == 32, "the MAC of a slot has another length")
        self.passphrase = any(one[0] == b"scrypt" for one in self.stanzas)
        must(not self.passphrase or len(self.stanzas) == 1, "a stanza for a passphrase is not alone")
        for kind, *arguments, body in self.stanzas:
            known = {b"X25519": (32, 1), b"scrypt": (16, 2)}.get(kind)
            must(not known or len(arguments) == known[1] and len(unbase64(arguments[0])) == known[0] and len(body) == 32, "a stanza of a slot is wrong")
            must(kind != b"scrypt" or re.fullmatch(rb"[1-9][0-9]?", arguments[1]), "the work factor of a slot is wrong")

    def line(self):
        end = self.data.find(b"\n", self.at)
        must(end >= 0, "a slot is cut")
        line, self.at = self.data[self.at : end], end + 1
        return line

    def open(self, keys):
        """The keyring key, or None where no key opens the slot."""
        for kind, *arguments, body in self.stanzas:
            for key in self.wrapping(kind, arguments, keys):
                try:
                    file_key = unseal("ChaCha20Poly1305", key, bytes(12), body, None, "a slot")
                except Damaged:
                    continue
                must(hmac.digest(hkdf(file_key, b"", b"header"), self.header, "sha256") == self.mac, "the header of a slot was changed")
                nonce, content = self.data[self.at : self.at + 16], self.data[self.at + 16 :]
                must(len(content) == 32 + TAG, "the content of a slot has another length")
                return unseal("ChaCha20Poly1305", hkdf(file_key, nonce, b"payload"), bytes(11) + b"\1", content, None, "the content of a slot")
        return None

    def wrapping(self, kind, arguments, keys):
        """The keys that may open a stanza."""
        if kind == b"X25519":
            share = unbase64(arguments[0])
            for secret in keys.secrets:
                shared, public = exchange(secret, share), exchange(secret, (9).to_bytes(32, "little"))
                if any(shared):
                    yield hkdf(shared, share + public, b"age-encryption.org/v1/X25519")
        elif kind == b"scrypt" and keys.passphrase is not None:
            if int(arguments[1]) > WORK_FACTOR:
                keys.hints.append(f"a passphrase has the work factor {int(arguments[1])}, and this reader tries at most {WORK_FACTOR}")
                return
            salt, cost = b"age-encryption.org/v1/scrypt" + unbase64(arguments[0]), 1 << int(arguments[1])
            yield hashlib.scrypt(keys.passphrase, salt=salt, n=cost, r=8, p=1, maxmem=2**10 * cost + 2**25, dklen=32)


class Keys:
    """What the user has to open archives with."""

    def __init__(self, passphrase=None, secrets=()):
        self.passphrase, self.secrets, self.hints = passphrase, list(secrets), []

    def any(self):
        return self.passphrase is not None or bool(self.secrets)


class KeyRecord:
    """The body of a KEY record."""

    def __init__(self, body):
        must(len(body) in KEY_LENGTHS, "a KEY has another length")
        version, kem, zero, self.number, length, self.wrapped = struct.unpack_from("<BBHII2344s", body)
        refuse(version != 1 or kem != 1, f"a KEY of version {version}, KEM {kem}")
        must(self.number and not zero and length <= min(KEYRING_MOST, len(body) - KEYRING_AT), "the fields of a KEY are wrong")
        must(not body[KEYRING_AT + length :].strip(b"\0"), "the padding of a KEY is not zeros")
        self.sealed = body[KEYRING_AT : KEYRING_AT + length]
        must(length >= 2 + SALT + TAG + 16 and blake3(self.sealed[:-16]).digest()[:16] == self.sealed[-16:], "a keyring does not match its check")
        refuse(self.sealed[0] != 1, f"a keyring of version {self.sealed[0]}")
        fields = Cursor(self.sealed[1:-16])
        count = fields.get("B")[0]
        must(1 <= count <= 64, "a keyring has too many slots, or none")
        self.slots = []
        for length in (fields.get("H")[0] for _ in range(count)):
            must(length <= SLOT_MOST, "a slot is too long")
            self.slots.append(fields.take(length))
        self.associated, self.salt, self.content = self.sealed[: 1 + fields.at], *fields.get("lr")


class Keyring:
    """The secrets of an archive, and whom it trusts."""

    def __init__(self, record, key):
        self.plain = unseal("AESGCM", derive("vmfold 2026 keyring v1", key + record.salt), bytes(12), record.content, record.associated, "the keyring")
        fields = Cursor(self.plain)
        version = fields.get("B")[0]
        refuse(version != 1, f"a keyring's content of version {version}")
        self.number, self.created, self.index_key, self.id_key, seed = fields.get("IQhhh")
        self.pairs = [tuple(fields.get("hh")) for _ in range(fields.varint(64))]
        trusted = [fields.get("sh", 128) for _ in range(fields.varint(256))]
        slots = [fields.get("sBsQ", 128, None, 4096) for _ in range(fields.varint(64))]
        refuse(any(kind > 2 for _, kind, _, _ in slots), "a slot of an unknown kind")
        must(self.pairs and len(slots) == len(record.slots) and fields.at == len(self.plain), "the content of the keyring is malformed")
        must(all(bool(kind) == bool(recipient) for _, kind, recipient, _ in slots), "a slot without its recipient, or a passphrase with one")
        try:
            [text.decode() for text in [one[0] for one in trusted + slots] + [one[2] for one in slots]]
        except UnicodeDecodeError:
            raise Damaged("a string of the keyring is not UTF-8") from None
        must(self.number == record.number, "the keyring has another number than its KEY")
        self.signers = [public_key(seed)] + [public for _, public in trusted]


def open_keyring(record, keys, harm):
    """Tries all slots. One that is damaged is told, and the others serve."""
    slots, key, opened = [], None, []
    for data in record.slots:
        try:
            slots.append(Slot(data))
        except Damaged as error:
            harm(str(error))
    for slot in sorted(slots, key=lambda one: one.passphrase):
        try:
            key = key or slot.open(keys)
        except Damaged as error:
            opened.append(str(error))
            harm(str(error))
    must(key or not opened, "; ".join(opened))
    if key is None:
        hints = "".join(f"; {hint}" for hint in keys.hints)
        raise Locked(f"the key is wrong: none of the {len(record.slots)} slots opens by what was given{hints}")
    return Keyring(record, key)


def associated(header):
    """What of a record's header its seal and signature prove: kind, version, flags, suite, key, archive, epoch."""
    return header[8:14] + header[16:40]


class Seals:
    """Opens what is sealed with the keys of a keyring."""

    def __init__(self, keyring):
        self.keyring, self.epochs = keyring, {}

    def pair(self, pair_name):
        """The seeds of the pair whose name this is: the first bytes of a hash of both of its public keys."""
        for data, metadata in self.keyring.pairs:
            if blake3(xwing_pair(data)[0] + xwing_pair(metadata)[0]).digest()[:PAIR] == pair_name:
                return data, metadata
        raise Damaged("the keyring does not have the pair that the keys of an epoch are wrapped for")

    def unwrap(self, wrapped, lane, epoch):
        """The data key and the metadata key of an epoch, from the name of a pair and what is wrapped for it."""
        pair_name, *both = split(wrapped, PAIR, WRAPPED, WRAPPED)
        return tuple(self.unwrap_one(*one, lane + epoch) for one in zip((DATA, METADATA), self.pair(pair_name), both))

    def unwrap_one(self, number, seed, wrapped, of):
        ciphertext, sealed = split(wrapped, 1120, 48)
        key = derive("vmfold 2026 epoch key v1", xwing_decapsulate(seed, ciphertext))
        return unseal("AESGCM", key, bytes(12), sealed, bytes([number]) + of, "the key of an epoch")

    def segment(self, key, header, salt, number, last, sealed, more=b""):
        """A segment of a record. `header` is what `associated` gives."""
        key = self.keyring.index_key if key == INDEXES else self.epochs[header[6:22], header[22:30]][key - 1]
        nonce = struct.pack("<Q3xB", number, last)
        return unseal("AESGCM", derive("vmfold 2026 record v1", key + salt), nonce, sealed, header + more, "a seal")

    def padded(self, header, body, more=b""):
        """The content of a record that is one segment."""
        plain = self.segment(header[5], header, body[:SALT], 0, 1, body[SALT:], more)
        must(len(plain) >= 4, "what a seal holds is too short")
        end = 4 + int.from_bytes(plain[:4], "little")
        must(end <= len(plain) and not plain[end:].strip(b"\0"), "the padding of a seal is wrong")
        return plain[4:end]

    def trusted(self, header, body):
        """Checks all that the clear part of a COMMIT tells of its seal, and its signature, before any of it is used. Gives the length of that part."""
        must(len(body) >= CLEAR, "a sealed COMMIT is cut")
        clear, (version, kem, zero, signer) = int.from_bytes(body[72:76], "little"), struct.unpack_from("<BBH8s", body, 104)
        must(version == 1 and kem == 1, f"the seal of a COMMIT has version {version}, KEM {kem}")
        message = derive("vmfold 2026 commit v1", header + body[:SIGNED_AT] + bytes(SIGNATURE) + body[KEYS_AT:])
        signers = [one for one in self.keyring.signers if blake3(one).digest()[:8] == signer]
        must(signers, "a COMMIT is signed by nobody that the keyring knows")
        must(any(signed(one, body[SIGNED_AT:KEYS_AT], message) for one in signers), "the signature of a COMMIT is wrong")
        must(CLEAR <= clear <= len(body) and not zero, "the clear part of a COMMIT is wrong")
        return clear

    def learn(self, header, body):
        """Learns the keys of an epoch from its COMMIT."""
        clear = self.trusted(header, body)
        of = header[6:22], header[22:30]
        self.epochs[of] = self.unwrap(body[KEYS_AT:CLEAR], *of)
        return clear

    def commit(self, header, body):
        """A COMMIT without its seal."""
        clear = self.learn(header, body)
        return body[:clear] + self.padded(header, body[clear:], body[:SIGNED_AT] + bytes(SIGNATURE) + body[KEYS_AT:clear])


def padme(length):
    """The length to which writers pad."""
    if length < 2:
        return length
    exponent = length.bit_length() - 1
    low = (1 << exponent - exponent.bit_length()) - 1 if exponent > exponent.bit_length() else 0
    return length + low & ~low

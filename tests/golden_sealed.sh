#!/usr/bin/env bash
# Makes a golden sealed archive: three commits of a pool of a few blocks, two pairs of keys, a passphrase and an identity of age.
# Usage: bash tests/golden_sealed.sh OUT.vmfold. Beside it are `passphrase` and `identity`. Run once for each released version; the files stay for ever.
# Whoever makes it is the host `golden`, and the pool is /mnt/pool, so that the archive tells nothing of the machine.
set -eu
if [ "${1-}" != --inside ]; then exec unshare --uts --mount bash "$0" --inside "$(realpath "$1")"; fi
hostname golden; out=$2; keys=$(dirname "$out"); work=$(mktemp -d); trap 'umount -q /mnt || true; rm -rf "$work"' EXIT
truncate -s 512M "$work/fs"; mkfs.btrfs -q "$work/fs" 2>/dev/null; mount -o loop "$work/fs" /mnt; pool=/mnt/pool; mkdir -p "$pool/vms"
# Blocks that can be told apart and compressed, and some that cannot.
blocks() { python3 -c 'import sys; [sys.stdout.write((f"block {n}\n" * 600)[:4096]) for n in range(int(sys.argv[1]), int(sys.argv[2]) + 1)]' "$@"; }
noise() { python3 -c 'import random,sys; sys.stdout.buffer.write(random.Random(int(sys.argv[2])).randbytes(int(sys.argv[1])))' "$@"; }
{ blocks 1 4; head -c 8192 /dev/zero; noise 8192 1; blocks 3 5; } > "$pool/vms/one.img"; truncate -s 100001 "$pool/vms/one.img"
{ blocks 4 6; head -c 900 /dev/zero | tr '\0' x; } > "$pool/vms/two.img"
export VMFOLD_STATE=$work/state
vmfold=${VMFOLD:-${CARGO_TARGET_DIR:-target}/release/vmfold}
export_pool() { find "$pool" -exec touch -h -d "$2" {} +; sync -f "$pool"; "$vmfold" export "$out" --index "$work/index" --label "$1" "${@:3}" "$pool"; }
export_pool first 2026-01-02T03:04:05Z --encrypt --passphrase-file "$keys/passphrase" --recipient "$(age-keygen -y "$keys/identity")"
blocks 7 8 | dd of="$pool/vms/two.img" bs=4096 conv=notrunc status=none
export_pool second 2026-01-03T03:04:05Z --passphrase-file "$keys/passphrase"
"$vmfold" key rotate "$out" --passphrase-file "$keys/passphrase"
noise 4096 2 | dd of="$pool/vms/two.img" bs=4096 seek=4 conv=notrunc status=none
export_pool third 2026-01-04T03:04:05Z --passphrase-file "$keys/passphrase"
(cd "$pool" && find . -type f | sort | xargs -d '\n' sha256sum) > "${out%.vmfold}.sha256"

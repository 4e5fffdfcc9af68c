meta:
  id: vmfold_archive
  title: Archive of vmfold, version 1
  file-extension: vmfold
  license: MIT OR Apache-2.0
  endian: le
doc: |
  Specified in words in archive-v1.md, and sealed ones in encryption-v1.md. Payloads of PLAN, LIST and COMMIT stay bytes here: with encoding 1 they
  are one zstd frame. What is sealed, and bodies with a mask or of unknown kinds, stay bytes too.
seq:
  - id: records
    type: record
    repeat: eos
enums:
  kind:
    1: head
    2: plan
    3: pack
    4: index
    5: commit
    6: tail
    7: parity
    8: key
    9: note
    10: list
    11: signature
  part:
    0: planned_images
    1: blocks
    2: final_images
  list_part:
    0: records
    1: images
  encoding:
    0: raw
    1: zstd
types:
  record:
    seq:
      - id: header
        type: header
      - id: sealed_body
        size: header.body_length
        type: sealed_body
        if: is_sealed_body
      - id: body
        size: header.body_length
        if: not is_sealed_body
        type:
          switch-on: "header.mask == 0 ? header.kind : kind::note"
          cases:
            kind::head: head
            kind::plan: plan
            kind::pack: pack
            kind::index: index
            kind::commit: commit
            kind::tail: tail
            kind::list: list
            kind::parity: parity
            kind::key: key
    instances:
      is_sealed_body:
        value: header.sealed and header.mask == 0 and header.kind != kind::commit
        doc: Whether nothing of the body is clear but the salt.
  header:
    seq:
      - id: magic
        contents: [0x89, vmfold, 0x0a]
      - id: kind
        type: u1
        enum: kind
      - id: version
        type: u1
        valid: 1
      - id: flags
        type: u2
        doc: Bit 0 critical, bit 1 sealed.
        valid:
          max: 3
      - id: suite
        type: u1
        doc: Of a sealed record, 1 AES-256-GCM, 2 ChaCha20-Poly1305 (reserved).
        valid:
          expr: "sealed or _ == 0"
      - id: key
        type: u1
        doc: Of a sealed record, 1 data (PACK), 2 metadata (PLAN, LIST, COMMIT), 3 index (INDEX, PLAN that announces blocks).
        valid:
          expr: "sealed or _ == 0"
      - id: mask
        type: u2
        doc: 0, or the number of the mask that the body is XORed with.
      - id: archive
        size: 16
      - id: epoch
        size: 8
      - id: sequence
        type: u8
      - id: body_length
        type: u8
        valid:
          max: 34603008
      - id: body_hash
        size: 32
        doc: BLAKE3 of the body without its mask.
      - id: header_hash
        size: 8
        doc: First bytes of BLAKE3 of the 88 bytes before.
    instances:
      critical:
        value: "(flags & 1) == 1"
      sealed:
        value: "(flags & 2) == 2"
  head:
    seq:
      - id: major
        type: u2
        valid: 1
      - id: minor
        type: u2
      - id: block_bytes
        type: u4
        valid: 4096
      - id: features_read
        type: u8
      - id: features_append
        type: u8
      - id: features_other
        type: u8
      - id: chunk_min
        type: u2
      - id: chunk_average
        type: u2
      - id: chunk_max
        type: u2
      - id: cut_version
        type: u2
      - id: cut_digest
        size: 32
  plan:
    seq:
      - id: encoding
        type: u1
        enum: encoding
        valid:
          in-enum: true
      - id: part
        type: u1
        enum: part
        valid:
          in-enum: true
      - id: last
        type: u1
        valid:
          max: 1
      - id: reserved
        contents: [0]
      - id: plain_length
        type: u4
        valid:
          min: 4
          max: 4194304
      - id: payload
        size-eos: true
  list:
    seq:
      - id: encoding
        type: u1
        enum: encoding
        valid:
          in-enum: true
      - id: part
        type: u1
        enum: list_part
        valid:
          in-enum: true
      - id: reserved
        contents: [0, 0]
      - id: plain_length
        type: u4
        valid:
          max: 4194304
      - id: payload
        size-eos: true
  pack:
    seq:
      - id: first_block
        type: u8
      - id: num_frames
        type: u4
        valid:
          min: 1
          max: 8192
      - id: num_blocks
        type: u4
        doc: From its first to its last, gaps included.
        valid:
          max: 262144
      - id: table
        type: frame_info
        repeat: expr
        repeat-expr: num_frames
      - id: frames
        size: table[_index].stored_length
        repeat: expr
        repeat-expr: num_frames
      - id: padding
        size-eos: true
        doc: Zeros.
  frame_info:
    seq:
      - id: block
        type: u4
        doc: The frame's first block less the pack's.
      - id: stored_length
        type: u4
        valid:
          max: 4194304
      - id: num_blocks
        type: u2
        valid:
          min: 1
          max: 1024
      - id: encoding
        type: u1
        enum: encoding
        valid:
          in-enum: true
      - id: reserved
        contents: [0, 0, 0, 0, 0]
      - id: hash
        size: 32
        doc: BLAKE3 of the stored bytes.
  index:
    seq:
      - id: first_block
        type: u8
      - id: num_hashes
        type: u4
        valid:
          max: 262144
      - id: reserved
        contents: [0, 0, 0, 0]
      - id: hashes
        size: 32
        repeat: expr
        repeat-expr: num_hashes
  commit:
    seq:
      - id: features_read
        type: u8
      - id: features_append
        type: u8
      - id: number
        type: u4
        valid:
          min: 1
          max: 4294967294
      - id: store_end
        type: u4
        valid:
          max: 4294967294
      - id: previous
        type: commit_location
        doc: The COMMIT before it in its lane, or zeros.
      - id: len_clear
        type: u4
        valid:
          min: 104
      - id: reserved
        contents: [0, 0, 0, 0]
      - id: archive
        size: 16
        valid: _parent.header.archive
      - id: epoch
        size: 8
        valid: _parent.header.epoch
      - id: seal
        type: commit_seal
        if: is_sealed
      - id: later_fields
        size: "len_clear - (is_sealed ? 2524 : 104)"
        doc: A sealed COMMIT has the index hash there, 32 bytes.
      - id: sealed_payload
        type: sealed_body
        size-eos: true
        if: is_sealed
      - id: payload
        type: commit_payload
        size-eos: true
        if: not is_sealed
    instances:
      is_sealed:
        value: _parent.header.sealed
  commit_payload:
    seq:
      - id: encoding
        type: u1
        enum: encoding
        valid:
          in-enum: true
      - id: reserved
        contents: [0, 0, 0]
      - id: plain_length
        type: u4
        valid:
          max: 98304
      - id: payload
        size-eos: true
  commit_seal:
    seq:
      - id: version
        type: u1
        valid: 1
      - id: kem
        type: u1
        doc: 1 X-Wing.
        valid: 1
      - id: reserved
        contents: [0, 0]
      - id: signer
        size: 8
        doc: First bytes of BLAKE3 of the public key.
      - id: signature
        size: 64
      - id: keys
        type: epoch_keys
  sealed_body:
    seq:
      - id: salt
        size: 16
      - id: segments
        size-eos: true
        doc: Each is followed by its tag of 16 bytes. Their lengths are known to whoever has the key.
  key:
    seq:
      - id: version
        type: u1
        valid: 1
      - id: kem
        type: u1
        doc: 1 X-Wing.
        valid: 1
      - id: reserved
        contents: [0, 0]
      - id: number
        type: u4
        valid:
          min: 1
      - id: len_keyring
        type: u4
        valid:
          max: 49152
      - id: keys
        type: epoch_keys
      - id: keyring
        size: len_keyring
        type: sealed_keyring
      - id: padding
        size-eos: true
        doc: Zeros.
  epoch_keys:
    seq:
      - id: pair
        size: 8
        doc: First bytes of BLAKE3 of both public keys.
      - id: data
        type: wrapped_key
      - id: metadata
        type: wrapped_key
  wrapped_key:
    seq:
      - id: ciphertext
        size: 1120
      - id: sealed
        size: 32
      - id: tag
        size: 16
  sealed_keyring:
    seq:
      - id: version
        type: u1
        valid: 1
      - id: num_slots
        type: u1
        valid:
          min: 1
          max: 64
      - id: slots
        type: slot
        repeat: expr
        repeat-expr: num_slots
      - id: salt
        size: 16
      - id: sealed
        size: _io.size - _io.pos - 32
      - id: tag
        size: 16
      - id: check
        size: 16
        doc: First bytes of BLAKE3 of all before.
  slot:
    seq:
      - id: len_file
        type: u2
        valid:
          max: 8192
      - id: file
        size: len_file
        doc: A file of age, version 1.
  tail:
    seq:
      - id: copies
        type: commit_location
        repeat: expr
        repeat-expr: 2
  parity:
    seq:
      - id: geometry
        type: geometry
      - id: tables_and_rows
        size-eos: true
        doc: |
          Zeros to a multiple of 4096 in the file; the tables of cells and headers, in blocks of 4096 bytes; rows of 16384 bytes; the
          geometry again.
  geometry:
    seq:
      - id: version
        type: u1
        valid: 1
      - id: percent
        type: u1
        valid:
          min: 1
          max: 100
      - id: flags
        type: u1
        doc: Bit 0, a copy of a COMMIT and a TAIL follow.
        valid:
          max: 1
      - id: num_records
        type: u1
        valid:
          min: 1
          max: 64
      - id: number
        type: u1
      - id: reserved
        contents: [0, 0, 0]
      - id: ofs_group
        type: u8
      - id: len_group
        type: u8
        valid:
          min: 1
      - id: ofs_first_record
        type: u8
      - id: first_sequence
        type: u8
      - id: num_rows
        type: u4
        valid:
          max: 63488
      - id: num_code_rows
        type: u4
        valid: 2048
      - id: num_stored_rows
        type: u4
        valid:
          min: 1
          max: 2048
      - id: num_headers
        type: u4
        valid:
          max: 65536
      - id: archive
        size: 16
      - id: epoch
        size: 8
      - id: commit
        type: commit_location
      - id: reserved2
        contents: [0, 0, 0, 0]
      - id: checksum
        type: u4
        doc: CRC32C of the 132 bytes before.
  commit_location:
    seq:
      - id: offset
        type: u8
      - id: length
        type: u8
      - id: body_hash
        size: 32

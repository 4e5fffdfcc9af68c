meta:
  id: vmfold_archive
  title: Archive of vmfold, version 1
  file-extension: vmfold
  license: MIT OR Apache-2.0
  endian: le
doc: |
  Specified in words in archive-v1.md. Payloads of PLAN and COMMIT stay bytes here: with encoding 1 they are one zstd frame.
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
  part:
    0: images
    1: blocks
    2: corrections
  encoding:
    0: raw
    1: zstd
types:
  record:
    seq:
      - id: header
        type: header
      - id: body
        size: header.body_length
        type:
          switch-on: header.kind
          cases:
            kind::head: head
            kind::plan: plan
            kind::pack: pack
            kind::index: index
            kind::commit: commit
            kind::tail: tail
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
        doc: Bit 0 critical, bit 1 encrypted (reserved).
        valid:
          max: 1
      - id: reserved
        contents: [0, 0, 0, 0]
      - id: archive
        size: 16
      - id: epoch
        type: u8
      - id: sequence
        type: u8
      - id: body_length
        type: u8
        valid:
          max: 33554432
      - id: body_hash
        size: 32
        doc: BLAKE3 of the body as stored.
      - id: header_hash
        size: 8
        doc: First bytes of BLAKE3 of the 88 bytes before.
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
      - id: commit
        type: u4
      - id: part
        type: u1
        enum: part
        valid:
          in-enum: true
      - id: encoding
        type: u1
        enum: encoding
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
          max: 4194304
      - id: payload
        size-eos: true
  pack:
    seq:
      - id: table_hash
        size: 32
      - id: first_block
        type: u8
      - id: num_frames
        type: u4
        valid:
          min: 1
          max: 8192
      - id: reserved
        contents: [0, 0, 0, 0]
      - id: table
        type: frame_info
        repeat: expr
        repeat-expr: num_frames
      - id: frames
        size: table[_index].stored_length
        repeat: expr
        repeat-expr: num_frames
  frame_info:
    seq:
      - id: stored_length
        type: u4
      - id: blocks
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
        contents: [0]
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
          max: 16777216
      - id: payload
        size-eos: true
  tail:
    seq:
      - id: copies
        type: commit_location
        repeat: expr
        repeat-expr: 2
  commit_location:
    seq:
      - id: offset
        type: u8
      - id: length
        type: u8
      - id: body_hash
        size: 32

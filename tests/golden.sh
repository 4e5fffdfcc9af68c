#!/usr/bin/env bash
# Makes a golden archive of the format's current version: two commits of a small pool with everything that a manifest can hold.
# Usage: bash tests/golden.sh OUT.vmfold. Run once for each released version; the files stay in testdata/ for ever.
set -eu
out=$(realpath "$1"); cd "$(dirname "$0")/.."
work=$(mktemp -d); trap 'umount -q "$work/mnt" || true; rm -rf "$work"' EXIT
truncate -s 512M "$work/fs"; mkfs.btrfs -q "$work/fs" 2>/dev/null; mkdir "$work/mnt"; mount -o loop "$work/fs" "$work/mnt"
pool=$work/mnt/pool; mkdir -p "$pool/appvms/work" "$pool/vm-templates/debian"
# Blocks that can be told apart and compressed, and some that cannot.
blocks() { python3 -c 'import sys; [sys.stdout.write((f"block {n}\n" * 600)[:4096]) for n in range(int(sys.argv[1]), int(sys.argv[2]) + 1)]' "$@"; }
noise() { python3 -c 'import random,sys; sys.stdout.buffer.write(random.Random(1).randbytes(int(sys.argv[1])))' "$@"; }
root=$pool/vm-templates/debian/root.img
{ blocks 1 40; head -c 65536 /dev/zero; noise 20480; blocks 10 20; } > "$root"; truncate -s 1000001 "$root"
cp --reflink=always "$root" "$root.3@2026-01-02T03:04:05Z"
blocks 100 104 | dd of="$root" bs=4096 seek=3 conv=notrunc status=none
fallocate -n -o 1048576 -l 65536 "$root"
ln "$root" "$pool/appvms/work/root.img"
head -c 900 /dev/zero | tr '\0' x > "$pool/appvms/work/small.img"
python3 -c 'import os, sys; os.setxattr(sys.argv[1], "user.note", b"kept")' "$root"
chmod 640 "$root"; find "$pool" -exec touch -h -d 2026-01-02T03:04:05.123456789Z {} +
sync -f "$pool"; vmfold=${VMFOLD:-${CARGO_TARGET_DIR:-target}/release/vmfold}
"$vmfold" export "$out" --index "$work/index" --label first "$pool"
blocks 200 203 | dd of="$pool/appvms/work/small.img" bs=4096 conv=notrunc status=none
touch -d 2026-01-03T03:04:05Z "$pool/appvms/work/small.img"; sync -f "$pool"
"$vmfold" export "$out" --index "$work/index" --label second "$pool"
(cd "$pool" && find . -type f | sort | xargs -d '\n' sha256sum) > "${out%.vmfold}.sha256"

#!/usr/bin/env bash
# The main job on real data, without touching yours: makes a scratch btrfs in a file, puts virtual machine disks on it whose
# guests hold this machine's own programs and documents, lets vmfold reclaim, and shows before and after.
# Needs about 3 GB of free space where it runs (TRY_DIR, default /var/tmp), and root (asks for it by sudo).
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/install.sh
. tests/pool.sh
cargo build --quiet --release --locked
if [ "$(id -u)" != 0 ]; then exec sudo --preserve-env=TRY_DIR,PATH,CARGO_TARGET_DIR bash "$0"; fi
vmfold=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold
work=$(mktemp -d "${TRY_DIR:-/var/tmp}/vmfold-try.XXXXXX"); mnt=$work/mnt; mkdir "$mnt"
cleanup() { umount -q "$work/guest" || true; umount -q "$mnt" || true; rm -rf --one-file-system "$work"; }
trap cleanup EXIT
truncate -s 8G "$work/scratch"; mkfs.btrfs -q "$work/scratch" >/dev/null 2>&1; mount -o loop "$work/scratch" "$mnt"
pool=$mnt/qubes

make_pool "$pool" "$work"
sync -f "$mnt"; (cd "$pool" && find . -type f -exec sha256sum {} + > "$work/sums")
used() { btrfs filesystem sync "$mnt" >/dev/null; btrfs filesystem df -b "$mnt" | awk -F'used=' '/^Data/ {printf "%d MiB", $2 / 1048576}'; }
before=$(used)

echo; echo "== vmfold report"; "$vmfold" report --index "$work/index" "$pool"
echo; echo "== vmfold reclaim --dry-run"; "$vmfold" reclaim --dry-run --index "$work/index" "$pool"
echo; echo "== vmfold reclaim"; "$vmfold" reclaim --index "$work/index" "$pool"
echo; echo "Data on the scratch filesystem, as btrfs counts it: $before before, $(used) after"
(cd "$pool" && sha256sum --quiet -c "$work/sums") && echo "Every image is byte for byte what it was"

echo; echo "== vmfold reclaim --compress zstd"; "$vmfold" reclaim --compress zstd --index "$work/index" "$pool"
echo; echo "Data on the scratch filesystem: $(used)"
(cd "$pool" && sha256sum --quiet -c "$work/sums") && echo "Every image is byte for byte what it was"

echo; echo "== vmfold export"; "$vmfold" export "$work/archive.vmfold" --index "$work/index" --label first "$pool"
echo; echo "== vmfold import, to another folder: nothing that is here already is written again"
"$vmfold" import "$work/archive.vmfold" --index "$work/index" --to "$mnt/restored" --seed "$pool"
echo; echo "Data on the scratch filesystem with everything there twice: $(used)"
(cd "$mnt/restored" && sha256sum --quiet -c "$work/sums") && echo "Every restored image is byte for byte what it was"

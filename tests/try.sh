#!/usr/bin/env bash
# The main job on real data, without touching yours: makes a scratch btrfs in a file, puts virtual machine disks on it whose
# guests hold this machine's own programs and documents, lets vmfold reclaim, and shows before and after.
# Needs about 3 GB of free space where it runs (TRY_DIR, default /var/tmp), and root (asks for it by sudo).
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/install.sh
cargo build --quiet --release --locked
if [ "$(id -u)" != 0 ]; then exec sudo --preserve-env=TRY_DIR,PATH bash "$0"; fi
vmfold=$PWD/target/release/vmfold
work=$(mktemp -d "${TRY_DIR:-/var/tmp}/vmfold-try.XXXXXX"); mnt=$work/mnt; guest=$work/guest; mkdir "$mnt" "$guest"
cleanup() { umount -q "$guest" || true; umount -q "$mnt" || true; rm -rf --one-file-system "$work"; }
trap cleanup EXIT
truncate -s 8G "$work/scratch"; mkfs.btrfs -q "$work/scratch" 2>/dev/null; mount -o loop "$work/scratch" "$mnt"
pool=$mnt/qubes; mkdir -p "$pool"/vm-templates/{debian,fedora} "$pool"/appvms/work "$pool"/standalones

# Files for the guests: at most 400 MB of what is installed here, without links and devices.
mkdir "$work/files"
find /usr/bin /usr/lib /usr/share -xdev -type f -size -8M 2>/dev/null | sort | awk 'NR % 3 != 0' > "$work/list"
total=0; while IFS= read -r file; do
  size=$(stat -c %s "$file"); total=$((total + size)); [ $total -lt 400000000 ] || break; printf '%s\0' "$file"
done < "$work/list" > "$work/chosen"
tar --null -C / -cf - --files-from "$work/chosen" 2>/dev/null | tar -C "$work/files" -xf -
guest_disk() { mkdir -p "$(dirname "$1")"; truncate -s 1G "$1"; mkfs.ext4 -q -F -d "$2" "$1"; }
in_guest() { local disk=$1; shift; mount -o loop,discard "$disk" "$guest"; (cd "$guest" && "$@"); fstrim "$guest" 2>/dev/null || true; umount "$guest"; }

echo "Making a template, a revision of it from before an update, and another template with the same programs…"
guest_disk "$pool/vm-templates/debian/root.img" "$work/files"
cp --reflink=always "$pool/vm-templates/debian/root.img" "$pool/vm-templates/debian/root.img.1@2026-01-01T10:00:00Z"
in_guest "$pool/vm-templates/debian/root.img" sh -c 'find . -type f | awk "NR % 20 == 0" | xargs -d "\n" rm; mkdir -p new; find . -name "*.so*" -type f | head -60 | xargs -d "\n" cp -t new; echo updated > new/version'
in_guest "$pool/vm-templates/debian/root.img" true
mkdir "$work/other"; (cd "$work/files" && find . -type f | awk 'NR % 4 != 0' | sort -r | tar -cf - -T -) | tar -C "$work/other" -xf -
guest_disk "$pool/vm-templates/fedora/root.img" "$work/other"
echo "…a machine restored from a backup, and a home with revisions…"
dd if="$pool/vm-templates/debian/root.img" of="$pool/standalones/restored.img" bs=1M conv=sparse status=none
mkdir "$work/home"; (cd "$work/files" && find . -path '*share*' -type f | awk 'NR % 2' | tar -cf - -T -) | tar -C "$work/home" -xf -
guest_disk "$pool/appvms/work/private.img" "$work/home"
for revision in 1 2 3; do
  cp --reflink=always "$pool/appvms/work/private.img" "$pool/appvms/work/private.img.$revision@2026-01-0${revision}T10:00:00Z"
  in_guest "$pool/appvms/work/private.img" sh -c "head -c 5M /dev/urandom > mail.$revision; find . -type f | awk 'NR % 30 == $revision' | while read -r f; do echo edited >> \"\$f\"; done"
done
sync -f "$mnt"; (cd "$pool" && find . -type f -exec sha256sum {} + > "$work/sums")
used() { btrfs filesystem sync "$mnt" >/dev/null; btrfs filesystem df -b "$mnt" | awk -F'used=' '/^Data/ {printf "%d MiB", $2 / 1048576}'; }
before=$(used)

echo; echo "== vmfold report"; "$vmfold" report --index "$work/index" "$pool"
echo; echo "== vmfold reclaim --dry-run"; "$vmfold" reclaim --dry-run --index "$work/index" "$pool"
echo; echo "== vmfold reclaim"; "$vmfold" reclaim --index "$work/index" "$pool"
echo; echo "Data on the scratch filesystem, as btrfs counts it: $before before, $(used) after"
(cd "$pool" && sha256sum --quiet -c "$work/sums") && echo "Every image is byte for byte what it was"

echo; echo "== vmfold export"; "$vmfold" export "$work/archive.vmfold" --index "$work/index" --label first "$pool"
echo; echo "== vmfold import, to another folder: nothing that is here already is written again"
"$vmfold" import "$work/archive.vmfold" --index "$work/index" --to "$mnt/restored" --seed "$pool"
echo; echo "Data on the scratch filesystem with everything there twice: $(used)"
(cd "$mnt/restored" && sha256sum --quiet -c "$work/sums") && echo "Every restored image is byte for byte what it was"

# Makes a pool as a host of virtual machines has it, of this machine's own programs and documents. Sourced, not run.
make_pool() { # folder for the pool, folder for what it takes on the way
  local pool=$1 work=$2 guest=$2/guest; mkdir -p "$guest" "$pool"/vm-templates/{debian,fedora} "$pool"/appvms/work "$pool"/standalones
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
}

#!/usr/bin/env bash
# Benchmark of encrypted archives beside plain ones: bash tests/bench/sealed.sh POOL.fsimg [ROUNDS]
#
# POOL.fsimg is a btrfs in a file, with images in its folder `pool`; it is only read. Each round (2 if not said) stores and restores the pool plain and
# encrypted, in turn, with cold caches; the table has the best of each, since only the machine's other work makes it slower. What is restored is
# compared with the pool. Archives and the filesystem that is restored to are made in $WORK (default: the file's folder). Prints a table in Markdown.
# Takes root. Nothing here decides a test.
set -euo pipefail
image=$(realpath "$1") rounds=${2:-2}; cd "$(dirname "$0")/../.."
. tests/install.sh
need openssl openssl openssl
[ -x /usr/bin/time ] || need /usr/bin/time time time
[ -n "${VMFOLD:-}" ] || { cargo build --quiet --release --locked; VMFOLD=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold; }
dir=$(mktemp -d "${WORK:-$(dirname "$image")}/bench.XXXXXX"); mkdir "$dir/from" "$dir/to"; export VMFOLD_STATE=$dir/state
trap 'umount -q "$dir/from" "$dir/to" || true; rm -rf --one-file-system "$dir"' EXIT
mount -o loop,ro "$image" "$dir/from"; pool=$dir/from/pool; echo 'correct horse battery' > "$dir/pass"
(cd "$pool" && find . -type f -exec openssl dgst -r -sha256 {} + | sort -k 2) > "$dir/sums"
fresh() { truncate -s 64G "$dir/fs"; mkfs.btrfs -q -f "$dir/fs" >/dev/null 2>&1; mount -o loop "$dir/fs" "$dir/to"; }
compare() {
  local root; root=$(dirname "$(find "$dir/to" -type d -name "$(ls "$pool" | head -1)" | head -1)")
  (cd "$root" && find . -type f -exec openssl dgst -r -sha256 {} + | sort -k 2) | cmp -s - "$dir/sums" || { echo "what was restored differs" >&2; exit 1; }
  umount "$dir/to"
}
timed() { # file command...: appends seconds and KiB to the file
  local to=$1; shift; sync; echo 3 > /proc/sys/vm/drop_caches
  /usr/bin/time -f '%e %M' -o "$dir/time" "$@" > "$dir/log" 2>&1 || { cat "$dir/log" >&2; return 1; }
  tail -1 "$dir/time" >> "$to"
}
for _ in $(seq "$rounds"); do
  for kind in plain encrypted; do
    rm -rf "$dir/$kind.vmfold" "$dir/index"; made=() key=()
    if [ $kind = encrypted ]; then key=(--passphrase-file "$dir/pass"); made=(--encrypt "${key[@]}"); fi
    timed "$dir/$kind.store" "$VMFOLD" export "$dir/$kind.vmfold" "$pool" --index "$dir/index" "${made[@]}"
    fresh; timed "$dir/$kind.restore" "$VMFOLD" import "$dir/$kind.vmfold" --to "$dir/to" --index "$dir/index" "${key[@]}"; compare
  done
done
fresh; sync; echo 3 > /proc/sys/vm/drop_caches
/usr/bin/time -f '%e %M' -o "$dir/pipe.from" "$VMFOLD" export - "$pool" --index "$dir/index" --encrypt --passphrase-file "$dir/pass" 2>"$dir/log" |
  /usr/bin/time -f '%e %M' -o "$dir/pipe.to" "$VMFOLD" import - --to "$dir/to" --passphrase-file "$dir/pass" > /dev/null
compare
best() { sort -n "$1" | head -1 | awk '{printf "%.1f s", $1}'; printf ', %d MiB' $(($(awk '{print $2}' "$1" | sort -n | tail -1) / 1024)); }
echo "| | archive, bytes | storing | restoring |"
echo "|---|---|---|---|"
for kind in plain encrypted; do
  echo "| $kind | $(stat -c %s "$dir/$kind.vmfold") | $(best "$dir/$kind.store") | $(best "$dir/$kind.restore") |"
done
echo "| encrypted, from one to the other through a pipe | | $(best "$dir/pipe.from") | $(best "$dir/pipe.to") |"

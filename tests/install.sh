# Installs what the two commands of the README need, where it is missing: Debian and Fedora by name. Sourced, not run.
need() { # command package-on-Debian package-on-Fedora
  command -v "$1" >/dev/null && return
  if command -v apt-get >/dev/null; then
    [ -n "${apt_updated:-}" ] || { $as_root apt-get -qq update; apt_updated=1; }
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$2" >/dev/null
  elif command -v dnf >/dev/null; then
    $as_root dnf -q -y install "$3"
  else
    echo "Please install $1: this is neither Debian nor Fedora" >&2; exit 1
  fi
}
as_root=; [ "$(id -u)" = 0 ] || as_root=sudo
command -v cargo >/dev/null || { echo "Please install Rust first: https://rustup.rs" >&2; exit 1; }
need gcc gcc gcc
need mkfs.btrfs btrfs-progs btrfs-progs
need mkfs.xfs xfsprogs xfsprogs
need mkfs.ext4 e2fsprogs e2fsprogs
need losetup mount util-linux
need setpriv util-linux util-linux
need setfattr attr attr
need zstd zstd zstd
need bzip2 bzip2 bzip2
need xz xz-utils xz
need lzma xz-utils xz-lzma-compat
need lz4 lz4 lz4
need lzop lzop lzop
need scrypt scrypt scrypt
need openssl openssl openssl
need qemu-io qemu-utils qemu-img
need node nodejs nodejs
need npm npm npm
# Debian packs Python without what makes an environment; no command of that name exists, so that it is always installed then.
python3 -c 'import ensurepip' 2>/dev/null || need python3-with-venv python3-venv python3

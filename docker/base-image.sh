#!/usr/bin/env bash
# Makes the image that ours begin with from Debian's packages, for machines that have root, debootstrap and Debian's archive, and
# reach no container registry: docker/base-image.sh [TAG]. It trusts the CAs that this machine trusts.
set -euo pipefail
tag=${1:-python:3.11-slim-bookworm} # the default of BASE in our Dockerfiles
mirror=${DEBIAN_MIRROR:-http://deb.debian.org}

if docker image inspect "$tag" >/dev/null 2>&1; then
  echo "$tag is there"
  exit 0
fi
if ! command -v debootstrap >/dev/null; then
  echo "$tag cannot be made without debootstrap: apt-get install debootstrap" >&2
  exit 2
fi
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$root" "$mirror/debian" >"$root.log" 2>&1 ||
  { tail -5 "$root.log" >&2; exit 1; }
cat >"$root/etc/apt/sources.list" <<LIST
deb $mirror/debian bookworm main
deb $mirror/debian bookworm-updates main
deb $mirror/debian-security bookworm-security main
LIST
chroot "$root" sh -ec 'apt-get update -q; DEBIAN_FRONTEND=noninteractive apt-get upgrade -qy; apt-get clean; rm -rf /var/lib/apt/lists/*' \
  >>"$root.log" 2>&1 || { tail -5 "$root.log" >&2; exit 1; }
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt" # after the upgrade, which may write it
tar -C "$root" -c . | docker import --change 'ENV LANG=C.UTF-8 PIP_CERT=/etc/ssl/certs/ca-certificates.crt' --message "Debian bookworm and its Python" - "$tag" >/dev/null
rm "$root.log"
echo "made $tag from Debian's packages"

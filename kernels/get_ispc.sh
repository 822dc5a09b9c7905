#!/bin/sh
# Prints the path of an ispc that is new enough, getting one where it can.
#
# usage: kernels/get_ispc.sh [PREFIX]     PREFIX (build/ispc of the source tree by default): where to unpack one
#
# In this order: $ISPC; ispc on PATH; the distribution's package, if this is root on Debian or Ubuntu; Debian's
# package, unpacked with its libraries into PREFIX (needs apt-get and dpkg, no root). NEO_NO_INSTALL=1 skips the
# third. Elsewhere it says what to install. All talk goes to stderr.
set -eu

NEEDED_MAJOR=1
NEEDED_MINOR=23
SUITE=trixie # the first Debian release with a new enough ispc (1.26)
here=$(cd "$(dirname "$0")" && pwd)
prefix=${1:-$here/../build/ispc}

say() { echo "get_ispc: $*" >&2; }

# new_enough PROGRAM: it runs, and reports a version that is new enough
new_enough() {
    version=$("$1" --version 2>/dev/null | sed -n 's/.*, \([0-9][0-9]*\.[0-9][0-9]*\)[. ].*/\1/p' | head -n 1)
    [ -n "$version" ] || return 1
    major=${version%%.*}
    minor=${version#*.}
    [ "$major" -gt $NEEDED_MAJOR ] || { [ "$major" -eq $NEEDED_MAJOR ] && [ "$minor" -ge $NEEDED_MINOR ]; }
}

found() {
    say "using $1 (version $version)"
    echo "$1"
    exit 0
}

if [ -n "${ISPC:-}" ]; then
    new_enough "$ISPC" && found "$ISPC"
    say "\$ISPC is $ISPC, which is not an ispc of version $NEEDED_MAJOR.$NEEDED_MINOR or newer"
    exit 1
fi
if command -v ispc >/dev/null 2>&1; then
    on_path=$(command -v ispc)
    new_enough "$on_path" && found "$on_path"
    say "$on_path is older than $NEEDED_MAJOR.$NEEDED_MINOR"
fi
[ -x "$prefix/bin/ispc" ] && new_enough "$prefix/bin/ispc" && found "$prefix/bin/ispc"

if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
    say "no ispc found, and this is not Debian or Ubuntu. Install Intel's ISPC compiler, version"
    say "$NEEDED_MAJOR.$NEEDED_MINOR or newer (macOS: brew install ispc; Fedora: dnf install ispc; Arch: pacman -S ispc; or a"
    say "release from https://github.com/ispc/ispc/releases), then put it on PATH or set ISPC to its path."
    exit 1
fi

if [ "$(id -u)" = 0 ] && [ "${NEO_NO_INSTALL:-0}" = 0 ]; then
    candidate=$(apt-cache policy ispc 2>/dev/null | sed -n 's/^ *Candidate: \([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p')
    if [ -n "$candidate" ] && [ "${candidate%%.*}" -ge $NEEDED_MAJOR ] && [ "${candidate#*.}" -ge $NEEDED_MINOR ]; then
        say "installing the distribution's ispc $candidate"
        if apt-get install -y -qq ispc >&2; then
            on_path=$(command -v ispc) && new_enough "$on_path" && found "$on_path"
        fi
    fi
fi

say "unpacking ispc from Debian $SUITE into $prefix"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
mkdir -p "$work/sources" "$work/lists/partial" "$work/archives/partial" "$work/debs"
: >"$work/status"
key=$(ls /usr/share/keyrings/debian-archive-keyring.* 2>/dev/null | head -n 1 || true)
if [ -z "$key" ]; then
    say "Debian's archive key is missing: apt-get install debian-archive-keyring"
    exit 1
fi
# The mirror that this machine already uses, if it is Debian's; it is reachable from here.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep '/debian/*$' | head -n 1 || true)
cat >"$work/sources/ispc.sources" <<EOF
Types: deb
URIs: ${mirror:-http://deb.debian.org/debian}
Suites: $SUITE
Components: main
Signed-By: $key
EOF

# An apt of its own: no state of this machine's package manager is read or changed.
apart() {
    program=$1
    shift
    "$program" -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o APT::Default-Release= \
        -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" -o Dir::Cache="$work" \
        -o Dir::Cache::archives="$work/archives" -o Acquire::Languages=none -o APT::Sandbox::User= "$@"
}
apart apt-get update >&2
packages=$(apart apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances ispc | grep '^[a-z]' | sort -u)
[ -n "$packages" ] || { say "Debian $SUITE has no ispc for this processor"; exit 1; }
(cd "$work/debs" && apart apt-get download $packages >&2)
for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
done

# Kept: the compiler, the libraries, and the loader that goes with them. Built aside, then moved in one step.
loader=$(cd "$work/root" && find . \( -name 'ld-linux-*.so.*' -o -name 'ld-linux.so.*' \) \( -type f -o -type l \) | head -n 1)
new="$prefix.new.$$"
rm -rf "$new"
mkdir -p "$new/bin" "$new/lib" "$new/libexec"
find "$work/root" -path '*/lib/*-linux-gnu*/*' -name 'lib*.so*' -exec cp -a {} "$new/lib/" \;
cp -L "$work/root/$loader" "$new/lib/loader"
cp "$work/root/usr/bin/ispc" "$new/libexec/ispc"
cat >"$new/bin/ispc" <<'EOF'
#!/bin/sh
here=$(dirname "$(dirname "$(readlink -f "$0")")")
exec "$here/lib/loader" --inhibit-cache --library-path "$here/lib" "$here/libexec/ispc" "$@"
EOF
chmod +x "$new/bin/ispc"
new_enough "$new/bin/ispc" || { say "the unpacked ispc does not run here"; rm -rf "$new"; exit 1; }
rm -rf "$prefix"
mkdir -p "$(dirname "$prefix")"
mv "$new" "$prefix"
found "$prefix/bin/ispc"

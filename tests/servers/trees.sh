# shellcheck shell=bash
# Trees of Debian's releases with their RabbitMQ and Postgres, for `./run.sh test --servers`, which sources
# this. What runs in them is started by `enter`, beside this file.

TREES=$HERE/target/servers

# release_with rabbitmq-server|postgresql VERSION: Debian's release that has it.
release_with() {
  case $1-$2 in
    rabbitmq-server-3.10 | postgresql-15) echo bookworm ;;
    rabbitmq-server-4.0 | postgresql-17) echo trixie ;;
    # Not released, so what it has changes: see `tree_with`.
    rabbitmq-server-4.3 | postgresql-18 | *-newest) echo forky ;;
    *) return 1 ;;
  esac
}

# Where this machine's apt has its own release of Debian from.
debian_mirror() {
  local release
  # shellcheck source=/dev/null
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  # shellcheck disable=SC2016
  apt-get indextargets --format '$(REPO_URI)' "Codename: $release" 'Component: main' | head -n 1 | grep .
}

# version_in TREE PACKAGE: the beginning of its version that names its series.
version_in() {
  local version
  # dpkg-query's own.
  # shellcheck disable=SC2016
  version=$(chroot "$1" dpkg-query -W -f '${Version}' "$2") || return 1
  case $2 in
    rabbitmq-server) cut -d . -f 1,2 <<<"$version" ;;
    *) cut -d + -f 1 <<<"$version" ;;
  esac
}

# What is done in a tree while it is made. No package may start what it brings.
fill_tree() {
  local release=$1 tree=$2 mirror=$3 user
  # The second name is a script of debootstrap's: an older one does not know the release's own, all
  # of which are the same.
  debootstrap --variant=minbase "$release" "$tree" "$mirror" sid || return 1
  printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"
  chmod +x "$tree/usr/sbin/policy-rc.d"
  mkdir -p "$tree/etc/postgresql-common"
  echo 'create_main_cluster = false' >"$tree/etc/postgresql-common/createcluster.conf"
  cp /etc/hosts "$tree/etc/hosts"
  # Postgres asks for the name of who runs it, who is known to this machine by this number.
  for user in rabbitmq postgres; do
    chroot "$tree" groupadd --system --gid "$(id -g "$user")" "$user" || return 1
    chroot "$tree" useradd --system --uid "$(id -u "$user")" --gid "$user" "$user" || return 1
  done
  DEBIAN_FRONTEND=noninteractive unshare --mount "$HERE/tests/servers/enter" "$tree" root \
    apt-get install -y --no-install-recommends rabbitmq-server postgresql pgbouncer || return 1
  chroot "$tree" apt-get clean
}

# make_tree RELEASE: prints where it is; without it, why not.
make_tree() {
  local release=$1 tree=$TREES/$1 mirror
  if [ ! -e "$tree.made" ]; then
    mirror=$(debian_mirror) || { say "apt knows no archive of Debian here"; return 1; }
    say "making a tree of Debian $release with its RabbitMQ and Postgres"
    mkdir -p "$TREES"
    rm -rf --one-file-system "$tree"
    fill_tree "$release" "$tree" "$mirror" >"$tree.log" 2>&1 \
      || { say "Debian $release cannot be had here, see $tree.log: $(tail -n 1 "$tree.log")"; return 1; }
    touch "$tree.made"
  fi
  echo "$tree"
}

# tree_with PACKAGE VERSION: the same for the Debian that has it, or had when its tree was made.
tree_with() {
  local release tree version
  release=$(release_with "$1" "$2")
  tree=$(make_tree "$release") || return 1
  version=$(version_in "$tree" "$1") || return 1
  case $2 in
    newest | "$version") echo "$tree" ;;
    *) say "Debian $release has $1 $version, not $2"; return 1 ;;
  esac
}

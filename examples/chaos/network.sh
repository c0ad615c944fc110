# shellcheck shell=bash
# Networks for the servers of `./run.sh chaos --cluster`, which sources this. The run is in namespaces of
# its own: its names and addresses are nobody else's, and all that it has started, its links and its shared
# memory go when its first process does, however that ends. In there each server is in a network namespace of
# its own, with a link to those who use it and one to its peers, either of which can be down:
#
#   replicas, clients, workers ── clients (bridge) ──┬── server 1 ──┬── peers (bridge)
#                                                    └── server 2 ──┘

# A command that what follows is run by. setpriv ends it when this script is killed.
NAMESPACES=(setpriv --pdeathsig KILL unshare --net --ipc --mount --pid --fork --kill-child --mount-proc)

# What hinders it here; nothing where it can be done.
hinders_networks() {
  local said
  is_root || { echo "only root can make networks"; return; }
  (need iproute2) >&2 || { echo "ip, of the package iproute2, is missing"; return; }
  # One of each thing that is needed.
  said=$("${NAMESPACES[@]}" bash -ec 'ip link add clients type bridge; ip link add clients-1 type veth peer name peer
    ip link set clients-1 master clients; mount -t tmpfs tmpfs /dev/shm; unshare --net true' 2>&1) \
    || echo "${said:-namespaces cannot be made here}"
}

# in_own_networks COMMAND...: in namespaces of its own, passing signals on to it, which unshare does not.
in_own_networks() {
  local status=0 child
  "${NAMESPACES[@]}" "$@" & child=$!
  # shellcheck disable=SC2064
  trap "kill -TERM \$(cat /proc/$child/task/$child/children)" INT TERM
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
  trap - INT TERM
  return "$status"
}

# make_networks FOLDER SERVER...: to be called in there. What `private` has to know of a server, whose folder is
# FOLDER/SERVER, is in FOLDER/SERVER.network.
make_networks() {
  local folder=$1 number=0 side server namespace
  shift
  # Of this run alone, and gone with it; of the machine's, Postgres would leave something there when killed.
  mount -t tmpfs tmpfs /dev/shm
  mkdir -p "$folder/networks"
  mount -t tmpfs tmpfs "$folder/networks"
  ip link set lo up
  for side in clients peers; do ip link add "$side" type bridge && ip link set "$side" up; done
  ip addr add 10.77.1.1/24 dev clients
  for server in "$@"; do
    number=$((number + 1)) namespace=$folder/networks/$number
    touch "$namespace"
    unshare --net="$namespace" ip link set lo up
    add_link "$namespace" clients "$number" "10.77.1.$((10 + number))"
    add_link "$namespace" peers "$number" "10.77.2.$((10 + number))"
    mkdir -p "$(dirname "$folder/$server")"
    {
      printf 'NETWORK=%q NETWORK_NUMBER=%s\n' "$namespace" "$number"
      echo "ADDRESS=10.77.1.$((10 + number)) PEERS_ADDRESS=10.77.2.$((10 + number))"
      echo "NODE_HOST=10.77.2.$((10 + number)) LISTEN=0.0.0.0"
    } >"$folder/$server.network"
  done
}

# one_way FOLDER mute|deaf down|up: what a server sends to its peers gets lost, or what they send to it, without
# a word to either. The sender takes a wrong address for its neighbour's: the packets are on the bridge, and
# nobody takes them.
one_way() {
  local way=$2 state=$3 namespace number
  network_of "$1"
  for namespace in "$(dirname "$NETWORK")"/*; do
    number=$(basename "$namespace")
    [ "$number" != "$NETWORK_NUMBER" ] || continue
    case $way in
      mute) neighbour "$NETWORK" "10.77.2.$((10 + number))" "$state" ;;
      deaf) neighbour "$namespace" "$PEERS_ADDRESS" "$state" ;;
    esac
  done
}

# neighbour NAMESPACE ADDRESS down|up
neighbour() {
  local change=(del "$2")
  if [ "$3" = down ]; then change=(replace "$2" lladdr 02:00:00:00:00:00 nud permanent); fi
  nsenter --net="$1" ip neigh "${change[@]}" dev peers
}

# add_link NAMESPACE clients|peers NUMBER ADDRESS: from a server to a bridge.
add_link() {
  local namespace=$1 bridge=$2 number=$3 address=$4
  ip link add "$bridge-$number" type veth peer name "$bridge" netns "$namespace"
  ip link set "$bridge-$number" master "$bridge" up
  nsenter --net="$namespace" ip addr add "$address/24" dev "$bridge"
  nsenter --net="$namespace" ip link set "$bridge" up
}

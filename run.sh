#!/usr/bin/env bash
# The one script of the project; `./run.sh --help` says what it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
HERE=$PWD

usage() {
  cat <<'EOF'
Usage: ./run.sh [COMMAND]

  (none) [ARGS]        Run the service as .env says (made from .env-template when missing). A
                       RabbitMQ, Postgres or InfluxDB that is configured on this machine and does
                       not answer is started, and stopped again at the end.
  demo                 One job from end to end, on services of its own: nothing else is touched.
  dev [DEFINITIONS]    For developers of workers and clients: the service with services of its own, stub
                       workers that succeed, fail, crash or take long as a job asks for, its page,
                       and a job of each kind. Ctrl-C ends all. DEFINITIONS is a file of workflows.
                       OWN=TASK,... leaves these tasks to workers of yours.
  services up|down|status
                       The services that .env names, kept until `down`.
  test [ARGS]          All tests, on services of their own; ARGS go to `cargo test`.
       --keep [ARGS]   The same, leaving the services for the next run; source
                       target/test-services/env to run `cargo test` by hand.
       --stop          Stop what --keep has left.
       --servers RABBITMQ,POSTGRES
                       On these versions, each in the tree of a Debian that has it, as root on a
                       Debian: 3.10, 4.0 or 4.3, and 15, 17 or 18, such as 4.0,17; or `newest`.
       --pooler        With a PgBouncer in transaction mode between the service and Postgres.
       --short         The main way of a job, crashes and the servers' failures alone.
  chaos [--jobs N] [--replicas R] [--minutes M] [--seed S] [--idle-clients N] [--figures README]
        [--cluster] [--servers RABBITMQ,POSTGRES] [--dev]
                       Load on replicas while they and all around them fail; whether anything was
                       lost. With --dev the program that the tests run, not that of a release.
  bench [--only PART] [--compare REPORT] [--figures README]
                       Throughput, latency and cost, beside the least that anything could need.
  bench --soak MINUTES Moderate load, and whether anything grows meanwhile.
  containers [--keep] [--only REGEX]
                       The image, docker-compose.yml, --scale and the switch from the Python
                       service, in real containers. Root on a Debian needs no docker daemon for
                       it: it starts one of its own.
  lint                 Formatting, clippy, rustdoc, and shellcheck and cargo-deny where installed.

Services are started with docker compose where a docker daemon answers, else from installed
programs (Debian: rabbitmq-server, postgresql, influxdb), which are installed when this is root on
a machine with apt-get. `demo` and `test` always use installed programs. In Git Bash on Windows
only the docker way works: ./run.sh and ./run.sh services.
EOF
}

say() { printf '%s\n' "$*" >&2; }
die() { say "run.sh: $*"; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }

# Whether something listens on a port of this machine, or of another address.
answers() { (exec 3<>"/dev/tcp/${2:-127.0.0.1}/$1") 2>/dev/null; }

# Polls until a command succeeds, for at most so many seconds.
wait_until() {
  local seconds=$1 what=$2; shift 2
  local deadline=$((SECONDS + seconds))
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || { say "$what: not within $seconds s"; return 1; }
    sleep 0.1
  done
}

# A port that nobody listens on, below those that the kernel gives to clients.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    answers "$port" || { echo "$port"; return; }
  done
  die "no free port found"
}

# --- Programs ---------------------------------------------------------------------------------

# tree_of USER: the tree of another Debian whose programs run as that user, if these do.
tree_of() {
  case $1 in
    rabbitmq) echo "${OMOTES_RABBITMQ_TREE:-}" ;;
    postgres) echo "${OMOTES_POSTGRES_TREE:-}" ;;
  esac
}

# The newest PostgreSQL's program of that name; Debian keeps them out of PATH.
postgres_program() {
  local newest tree
  tree=$(tree_of postgres)
  newest=$(find "$tree/usr/lib/postgresql" -path "*/bin/$1" 2>/dev/null | sort -V | tail -n 1)
  [ -n "$newest" ] || newest=$(command -v "$1" || true)
  [ -n "$newest" ] && echo "${newest#"$tree"}"
}

# Debian's own rabbitmq-server refuses users other than root and rabbitmq; the one behind it doesn't.
rabbitmq_program() {
  local program=/usr/lib/rabbitmq/bin/$1
  if [ -x "$(tree_of rabbitmq)$program" ]; then echo "$program"; else command -v "$1"; fi
}

has_program() {
  case $1 in
    rabbitmq-server) rabbitmq_program rabbitmq-server >/dev/null ;;
    postgresql) postgres_program initdb >/dev/null ;;
    influxdb) command -v influxd >/dev/null ;;
    chromium-driver) command -v chromedriver >/dev/null ;;
    pgbouncer) command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] ;;
    prometheus) command -v promtool >/dev/null ;;
    chromium | curl | debootstrap | make) command -v "$1" >/dev/null ;;
    iproute2) command -v ip >/dev/null ;;
    python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
  esac
}

# Installs what is missing of these Debian packages, or says what to install.
need() {
  local package missing=()
  for package in "$@"; do
    has_program "$package" || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if is_root && command -v apt-get >/dev/null; then
    say "installing ${missing[*]}"
    # A package that starts its own service is of no use here; its programs are.
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } \
      >/tmp/omotes-apt.log 2>&1 || { tail -n 20 /tmp/omotes-apt.log >&2; die "installing failed"; }
    for package in "${missing[@]}"; do
      has_program "$package" || die "$package is installed, but its programs are not where they were expected"
    done
  else
    die "missing: ${missing[*]}. Install these packages (Debian's names), or start a docker daemon"
  fi
}

# --- Private services: one folder each, holding data, log and process id --------------------------

# network_of FOLDER: sets where the server of this folder runs, is reached, and is known to its peers by.
network_of() {
  NETWORK='' ADDRESS=127.0.0.1 LISTEN=127.0.0.1 PEERS_ADDRESS=127.0.0.1 NODE_HOST=localhost
  # Those of chaos may have networks of their own; see examples/chaos/network.sh.
  # shellcheck source=/dev/null
  if [ -f "$1.network" ]; then . "$1.network"; fi
}
network_of ''

address_of() { (network_of "$1"; echo "$ADDRESS"); }

in_network() { ${NETWORK:+nsenter --net="$NETWORK"} "$@"; }

# becomes USER: puts into `become` what a command begins with that is run by this user: servers refuse to
# run as root, and may be those of another Debian.
becomes() {
  local tree
  tree=$(tree_of "$1")
  become=(${NETWORK:+nsenter --net="$NETWORK"})
  if [ -n "$tree" ]; then become+=(unshare --mount "$HERE/tests/servers/enter" "$tree" "$1")
  elif is_root; then become+=(runuser -u "$1" --)
  fi
}

as_user() {
  local become
  becomes "$1"; shift
  "${become[@]}" "$@"
}

# The same in a session of its own, so that a signal to this script's group is not for the service.
as_user_apart() {
  local become
  becomes "$1"; shift
  setsid "${become[@]}" "$@"
}

# Makes a folder for a service. A checkout below /root cannot be entered by the services' users:
# then the folder is a link to one below /tmp.
service_folder() {
  local folder=$1 user=$2
  mkdir -p "$(dirname "$folder")"
  if [ ! -e "$folder" ]; then
    rm -f "$folder"
    mkdir "$folder"
    # By the whole path: what is below the current folder can be reached even where that can't.
    if is_root && ! runuser -u "$user" -- test -x "$PWD/$folder"; then
      rmdir "$folder"
      ln -s "$(mktemp -d "/tmp/omotes-$(basename "$folder")-XXXXXX")" "$folder"
    fi
    if is_root; then chown "$user" "$folder/"; fi
  fi
  (cd "$folder" && pwd -P)
}

remove_folder() {
  local folder=$1
  [ ! -L "$folder" ] || rm -rf "$(readlink "$folder")"
  rm -rf "$folder"
}

# What is in FOLDER.extra goes into a service's folder, for the service's user alone; the lines of
# `conf` there are added to its configuration, those of `exports` to RabbitMQ's environment.
extra_files() {
  local from=$1.extra folder=$2 user=$3
  [ -d "$from" ] || return 0
  cp "$from"/* "$folder/"
  (cd "$from" && for file in *; do
    chmod 600 "$folder/$file"
    if is_root; then chown "$user" "$folder/$file"; fi
  done)
}

json_text() { local text=${1//\\/\\\\}; printf '"%s"' "${text//\"/\\\"}"; }

# start_rabbitmq FOLDER PORT MANAGEMENT_PORT|"" USER PASSWORD VHOST...
start_rabbitmq() {
  local folder=$1 port=$2 management=$3 user=$4 password=$5 vhost vhosts='' permissions='' given=$1
  shift 5
  folder=$(service_folder "$folder" rabbitmq)
  extra_files "$given" "$folder" rabbitmq
  for vhost in "$@" /; do
    vhosts+="${vhosts:+,}{\"name\":$(json_text "$vhost")}"
    permissions+="${permissions:+,}{\"user\":$(json_text "$user"),\"vhost\":$(json_text "$vhost"),\"configure\":\".*\",\"write\":\".*\",\"read\":\".*\"}"
  done
  printf '{"users":[{"name":%s,"password":%s,"tags":"administrator"}],"vhosts":[%s],"permissions":[%s]}\n' \
    "$(json_text "$user")" "$(json_text "$password")" "$vhosts" "$permissions" >"$folder/definitions.json"
  {
    echo "load_definitions = $folder/definitions.json"
    echo "listeners.tcp.1 = $ADDRESS:$port"
    # What RabbitMQ 4 has by default.
    echo "max_message_size = 16777216"
    if [ -n "$management" ]; then echo "management.tcp.ip = 127.0.0.1"; echo "management.tcp.port = $management"; fi
    if [ -f "$folder/conf" ]; then cat "$folder/conf"; fi
  } >"$folder/rabbitmq.conf"
  if [ -n "$management" ]; then echo '[rabbitmq_management].'; else echo '[].'; fi >"$folder/enabled_plugins"
  # An epmd and a cookie of its own, so that no other node is seen or left behind.
  cat >"$folder/environment" <<EOF
export HOME=$folder RABBITMQ_NODENAME=omotes$port@$NODE_HOST RABBITMQ_NODE_PORT=$port
export RABBITMQ_DIST_PORT=$(free_port) ERL_EPMD_PORT=$(free_port) ERL_EPMD_ADDRESS=$PEERS_ADDRESS
export RABBITMQ_MNESIA_BASE=$folder/mnesia RABBITMQ_LOG_BASE=$folder/log
export RABBITMQ_CONFIG_FILE=$folder/rabbitmq.conf RABBITMQ_PID_FILE=$folder/pid
export RABBITMQ_ENABLED_PLUGINS_FILE=$folder/enabled_plugins RABBITMQ_CONF_ENV_FILE=/dev/null
export OMOTES_RABBITMQ_TREE=${OMOTES_RABBITMQ_TREE:-}${NETWORK:+ RABBITMQ_USE_LONGNAME=true}
EOF
  if [ -f "$folder/exports" ]; then cat "$folder/exports" >>"$folder/environment"; fi
  if is_root; then chown -R rabbitmq "$folder"; fi
  (
    # shellcheck source=/dev/null
    . "$folder/environment"
    cd "$folder"
    # A file per durable queue: with more queues than files, a start after a kill hangs for good
    # (RabbitMQ 3.10). runuser has reset the limit.
    # shellcheck disable=SC2016
    as_user_apart rabbitmq bash -c 'ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"; exec "$0"' \
      "$(rabbitmq_program rabbitmq-server)" >"$folder/output" 2>&1 &
  )
  wait_until 180 "RabbitMQ (see $folder/output)" answers "$port" "$ADDRESS" || return 1
  [ -z "$management" ] || wait_until 30 "RabbitMQ's management" answers "$management"
}

# start_postgres FOLDER PORT USER PASSWORD DATABASE
start_postgres() {
  local folder=$1 port=$2 user=$3 password=$4 database=$5 bin given=$1
  bin=$(dirname "$(postgres_program initdb)")
  folder=$(service_folder "$folder" postgres)
  extra_files "$given" "$folder" postgres
  if [ ! -d "$folder/data" ]; then
    printf '%s\n' "$password" >"$folder/password"
    if is_root; then chown postgres "$folder/password"; fi
    as_user postgres "$bin/initdb" -D "$folder/data" -U "$user" --auth=scram-sha-256 \
      --pwfile="$folder/password" --encoding=UTF8 --locale=C >"$folder/initdb" 2>&1 \
      || { cat "$folder/initdb" >&2; return 1; }
    echo "include_if_exists '../conf'" >>"$folder/data/postgresql.conf"
    if [ -n "$NETWORK" ]; then
      printf 'host %s all samenet scram-sha-256\n' all replication >>"$folder/data/pg_hba.conf"
    fi
  fi
  # From its folder, for a path in `conf` may be relative to it.
  (cd "$folder" && as_user postgres "$bin/pg_ctl" -D "$folder/data" -l "$folder/output" -w -t 60 \
    -o "-p $port -c listen_addresses=$LISTEN -c unix_socket_directories=$folder -c max_connections=300" \
    start >/dev/null) || { tail -n 20 "$folder/output" >&2; return 1; }
  if [ "$database" != postgres ]; then
    # It may be there from the last time.
    PGPASSWORD=$password psql -q -h "$ADDRESS" -p "$port" -U "$user" -d postgres \
      -c "CREATE DATABASE \"$database\"" 2>"$folder/createdb" \
      || grep -q 'already exists' "$folder/createdb" || { cat "$folder/createdb" >&2; return 1; }
  fi
}

# start_standby FOLDER PORT PRIMARYS_FOLDER PRIMARYS_PORT: every commit of the primary waits for it.
start_standby() {
  local folder=$1 port=$2 primary=$4 bin address peers_address names="ALTER SYSTEM SET synchronous_standby_names = 'standby'"
  address=$(address_of "$3") peers_address=$(network_of "$3"; echo "$PEERS_ADDRESS")
  bin=$(dirname "$(postgres_program initdb)")
  folder=$(service_folder "$folder" postgres)
  export PGPASSWORD=secret
  (cd "$folder" && as_user postgres "$bin/pg_basebackup" -D "$folder/data" -R -X stream -c fast \
    -d "host=$peers_address port=$primary user=omotes application_name=standby") || return 1
  start_postgres "$folder" "$port" omotes secret postgres || return 1
  psql -q -h "$address" -p "$primary" -U omotes -d postgres -c "$names" -c 'SELECT pg_reload_conf()' >/dev/null
}

# start_influxdb FOLDER PORT USER PASSWORD
start_influxdb() {
  local folder=$1 port=$2 user=$3 password=$4
  folder=$(service_folder "$folder" "$(id -un)")
  (
    export INFLUXDB_REPORTING_DISABLED=true INFLUXDB_HTTP_AUTH_ENABLED=true
    export INFLUXDB_META_DIR=$folder/meta INFLUXDB_DATA_DIR=$folder/data INFLUXDB_DATA_WAL_DIR=$folder/wal
    INFLUXDB_HTTP_BIND_ADDRESS=127.0.0.1:$port INFLUXDB_BIND_ADDRESS=127.0.0.1:$(free_port)
    export INFLUXDB_HTTP_BIND_ADDRESS INFLUXDB_BIND_ADDRESS
    cd "$folder"
    setsid influxd -pidfile "$folder/pid" >"$folder/output" 2>&1 &
  )
  wait_until 60 "InfluxDB (see $folder/output)" answers "$port" || return 1
  # Without a user there is no password to ask for; with one this is refused, and was done before.
  curl -s -o "$folder/user" "http://127.0.0.1:$port/query" --data-urlencode \
    "q=CREATE USER \"$user\" WITH PASSWORD '${password//\'/\\\'}' WITH ALL PRIVILEGES"
}

# stop_private FOLDER [FAST]: ends the service in this folder, if one runs there.
stop_private() {
  local folder=$1 fast=${2:-} pid='' signal=TERM
  [ -e "$folder/" ] || return 0
  [ -z "$fast" ] || signal=KILL
  if [ -f "$folder/data/postmaster.pid" ]; then
    pid=$(head -n 1 "$folder/data/postmaster.pid")
    # Postgres leaves its shared memory behind when killed; this is its fast way.
    [ -z "$fast" ] && signal=INT || signal=QUIT
  elif [ -f "$folder/pid" ]; then
    pid=$(cat "$folder/pid")
  fi
  if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
    kill "-$signal" "$pid"
    wait_until 60 "the service in $folder ends" eval "! kill -0 $pid" || kill -KILL "$pid"
  fi
  if [ -f "$folder/environment" ]; then
    # shellcheck source=/dev/null
    (. "$folder/environment" && in_network epmd -kill >/dev/null 2>&1) || true
  fi
}

# For tests that need a service of their own to break; see tests/integration/harness/deployment.rs and
# examples/chaos.
private() {
  local command=$1 folder=$2 service
  shift 2
  # Prints a variable as a file sets it.
  if [ "$command" = variable ]; then load_env "$folder"; printf '%s' "${!1-}"; return; fi
  service=$(basename "$folder")
  network_of "$folder"
  case $command-$service in
    start-rabbitmq)
      start_rabbitmq "$folder" "$1" '' omotes secret omotes omotes_celery && return
      # It may have lost the race for one of its other ports.
      tail -n 20 "$folder/output" >&2
      stop_private "$folder" fast
      start_rabbitmq "$folder" "$1" '' omotes secret omotes omotes_celery ;;
    start-postgres)
      # After a kill the old server's processes may take a moment to go.
      wait_until 30 "Postgres starts in $folder" start_postgres "$folder" "$1" omotes secret omotes ;;
    # By SIGKILL.
    kill-rabbitmq) stop_private "$folder" fast ;;
    kill-postgres) kill -KILL "$(head -n 1 "$folder/data/postmaster.pid")" ;;
    stop-*) stop_private "$folder" ;;
    remove-*) stop_private "$folder" fast; remove_folder "$folder" ;;
    standby-postgres) start_standby "$folder" "$@" ;;
    promote-postgres) as_user postgres "$(postgres_program pg_ctl)" -D "$folder/data" -w promote >/dev/null ;;
    signal-rabbitmq) kill "$1" "$(cat "$folder/pid")" ;;
    # Its link to its `clients` or its `peers` goes `up` or `down`, if it has a network of its own.
    link-*) ip link set "$1-$NETWORK_NUMBER" "$2" ;;
    # It is heard by none of its peers, or hears none (`mute`, `deaf`), from `down` to `up`.
    way-*)
      # shellcheck source=examples/chaos/network.sh
      . examples/chaos/network.sh
      one_way "$folder" "$@" ;;
    # No file grows beyond so many bytes: writing fails as on a full disk. As the server's own user,
    # for root may lack the right in a container.
    limit-postgres)
      local pid
      pid=$(head -n 1 "$folder/data/postmaster.pid")
      for pid in "$pid" $(cat "/proc/$pid/task/$pid/children"); do
        # One of the children may have ended since; a new one has it from its parent.
        as_user postgres prlimit --pid "$pid" "--fsize=$1:" || ! kill -0 "$pid" 2>/dev/null
      done ;;
    # One of Postgres's programs, from the server's folder.
    run-postgres)
      local program
      program=$(postgres_program "$1"); shift
      cd "$folder"
      as_user postgres "$program" "$@" ;;
    ctl-rabbitmq)
      # shellcheck source=/dev/null
      . "$folder/environment"
      as_user rabbitmq "$(rabbitmq_program rabbitmqctl)" -n "$RABBITMQ_NODENAME" "$@" ;;
    *) die "unknown: private $command $folder" ;;
  esac
}

# --- Services for .env --------------------------------------------------------------------------

make_env() {
  [ -f .env ] || { cp .env-template .env; say "made .env from .env-template"; }
}

# unquoted TEXT, which begins with a quote: puts what stands between the quotes into REPLY.
unquoted() {
  local text=$1 quote=${1:0:1} place char
  REPLY=''
  for ((place = 1; place < ${#text}; place++)); do
    char=${text:place:1}
    if [[ $char == "$quote" ]]; then
      [[ ${text:place+1} =~ ^[[:blank:]]*(#.*)?$ ]]
      return
    fi
    if [[ $char == \\ ]]; then
      place=$((place + 1))
      char=${text:place:1}
      case $quote$char in
        "''") ;;
        '"n') char=$'\n' ;;
        '"r') char=$'\r' ;;
        '"t') char=$'\t' ;;
        \"\\ | '""' | '"$') ;;
        *) char=\\$char ;;
      esac
    fi
    REPLY+=$char
  done
  return 1
}

# Exports what .env, or another file, sets and the environment doesn't. As src/config/environment.rs reads it:
# tests/env-lines.json holds both to the same. No message shows a value.
load_env() {
  local file=${1:-.env} line name value number=0 ours=' '
  # Byte by byte, whatever is in a value.
  local LC_ALL=C
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    if [ "$number" = 1 ]; then line=${line#$'\xef\xbb\xbf'}; fi
    line=${line%$'\r'}
    if [[ $line =~ ^[[:blank:]]*(#.*)?$ ]]; then continue; fi
    [[ $line =~ ^[[:blank:]]*(export[[:blank:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:blank:]]*=(.*)$ ]] \
      || die "$file, line $number: expected NAME=value, of a name with letters, digits and _"
    name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    if [[ $value =~ ^[[:blank:]]*([\"\'].*)$ ]]; then
      unquoted "${BASH_REMATCH[1]}" || die "$file, line $number: $name: its quote is not closed, or something follows it"
      value=$REPLY
    else
      value=${value%%[[:blank:]]#*}
      value=${value#"${value%%[![:blank:]]*}"}
      value=${value%"${value##*[![:blank:]]}"}
    fi
    # The last one of a name counts, as with docker compose.
    if [ -z "${!name+set}" ] || [[ $ours == *" $name "* ]]; then
      export "$name=$value"
      ours+="$name "
    fi
  done <"$file"
}

is_local() { case $1 in localhost | 127.0.0.1 | ::1) true ;; *) false ;; esac; }

docker_answers() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }

SERVICES=target/services
started=() # Services that this run has started, and stops.

# ensure NAME HOST PORT PACKAGE COMPOSE_SERVICE START...: starts a local service that doesn't answer.
ensure() {
  local name=$1 host=$2 port=$3 package=$4 compose=$5; shift 5
  is_local "$host" || { say "$name: $host:$port is not on this machine, left alone"; return; }
  answers "$port" && { say "$name: answers on port $port"; return; }
  started+=("$compose")
  if docker_answers; then
    # A daemon may answer that has no image and reaches no registry.
    if docker compose create "$compose" >&2; then
      say "$name: starting it with docker compose"
      docker compose up -d --wait "$compose" >&2 || die "docker compose could not start $compose"
      return
    fi
    say "$name: docker has no image for it and pulls none, so an installed program is used"
  fi
  need "$package" curl
  say "$name: starting a private one on port $port"
  "$@" || { stop_private "$SERVICES/$compose"; die "$name did not start"; }
}

ensure_services() {
  ensure RabbitMQ "${SDK_RABBITMQ_HOSTNAME:-localhost}" "${SDK_RABBITMQ_PORT:-5672}" \
    rabbitmq-server rabbitmq start_rabbitmq "$SERVICES/rabbitmq" "${SDK_RABBITMQ_PORT:-5672}" '' \
    "${SDK_RABBITMQ_USERNAME:-omotes}" "${SDK_RABBITMQ_PASSWORD:-guest}" \
    "${SDK_RABBITMQ_VIRTUALHOST:-omotes}" "${CELERY_RABBITMQ_VIRTUALHOST:-omotes}"
  ensure Postgres "${POSTGRESQL_HOST:-localhost}" "${POSTGRESQL_PORT:-5432}" \
    postgresql postgres start_postgres "$SERVICES/postgres" "${POSTGRESQL_PORT:-5432}" \
    "${POSTGRESQL_USERNAME:-postgres}" "${POSTGRESQL_PASSWORD:-postgres}" "${POSTGRESQL_DATABASE:-public}"
  if [ -n "${INFLUXDB_HOST-localhost}" ]; then
    ensure InfluxDB "${INFLUXDB_HOST:-localhost}" "${INFLUXDB_PORT:-8096}" \
      influxdb influxdb start_influxdb "$SERVICES/influxdb" "${INFLUXDB_PORT:-8096}" \
      "${INFLUXDB_USERNAME:-root}" "${INFLUXDB_PASSWORD:-root}"
  fi
}

stop_started() {
  local service
  for service in "${started[@]}"; do
    if [ -e "$SERVICES/$service" ]; then
      stop_private "$SERVICES/$service"
    else
      docker compose stop "$service" >&2
    fi
  done
}

services() {
  local service name port
  make_env
  load_env
  case ${1:-} in
    up) ensure_services ;;
    down)
      for service in rabbitmq postgres influxdb; do
        stop_private "$SERVICES/$service"
      done
      if docker_answers; then docker compose stop rabbitmq postgres influxdb >&2; fi
      ;;
    status)
      for service in rabbitmq:"${SDK_RABBITMQ_PORT:-5672}" postgres:"${POSTGRESQL_PORT:-5432}" \
        influxdb:"${INFLUXDB_PORT:-8096}"; do
        name=${service%:*} port=${service#*:}
        if ! answers "$port"; then echo "$name: does not answer on port $port"
        elif private_runs "$SERVICES/$name"; then echo "$name: answers on port $port, started by this script"
        else echo "$name: answers on port $port, somebody else's or docker's"; fi
      done
      ;;
    *) die "services up, down or status" ;;
  esac
}

private_runs() {
  local pid
  pid=$(head -qn 1 "$1/pid" "$1/data/postmaster.pid" 2>/dev/null | head -n 1)
  [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null
}

# --- Commands -------------------------------------------------------------------------------------

# Runs a program to its end, passing signals on to it; bash alone would let it go on.
run_child() {
  local status=0
  "$@" &
  local child=$!
  trap 'kill -TERM "$child" 2>/dev/null' INT TERM
  wait "$child" || status=$?
  # Interrupted by the signal, not by the end.
  while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
  trap - INT TERM
  return "$status"
}

# The allocator is built from C.
with_make() {
  case $OSTYPE in linux*) need make ;; esac
  "$@" --locked
}

start() {
  make_env
  load_env
  trap stop_started EXIT
  trap 'exit 130' INT TERM
  ensure_services
  with_make cargo build --release --bin omotes-orchestrator
  RUST_BACKTRACE=1 run_child target/release/omotes-orchestrator run "$@"
}

# Three services of one's own on free ports, their whereabouts in variables.
private_stack() {
  local folder=$1 management=$2 service running=()
  need rabbitmq-server postgresql influxdb curl
  RABBITMQ=$(free_port) POSTGRES=$(free_port) INFLUXDB=$(free_port)
  MANAGEMENT=${management:+$(free_port)}
  start_rabbitmq "$folder/rabbitmq" "$RABBITMQ" "$MANAGEMENT" omotes secret omotes omotes_celery & running+=($!)
  start_postgres "$folder/postgres" "$POSTGRES" omotes secret omotes & running+=($!)
  start_influxdb "$folder/influxdb" "$INFLUXDB" omotes secret & running+=($!)
  for service in "${running[@]}"; do wait "$service" || die "a service did not start; see $folder"; done
}

# Points the orchestrator to the RabbitMQ and the Postgres on these ports.
use_private() {
  local prefix
  for prefix in SDK TASK CELERY; do
    export "${prefix}_RABBITMQ_HOSTNAME=127.0.0.1" "${prefix}_RABBITMQ_PORT=$RABBITMQ"
    export "${prefix}_RABBITMQ_USERNAME=omotes" "${prefix}_RABBITMQ_PASSWORD=secret"
    export "${prefix}_RABBITMQ_VIRTUALHOST=omotes_celery"
  done
  export SDK_RABBITMQ_VIRTUALHOST=omotes
  export POSTGRESQL_HOST=127.0.0.1 POSTGRESQL_PORT=$POSTGRES POSTGRESQL_DATABASE=omotes
  export POSTGRESQL_USERNAME=omotes POSTGRESQL_PASSWORD=secret
  export RUST_BACKTRACE=1 LOG_LEVEL=INFO
}

remove_stack() {
  local folder=$1 service
  for service in rabbitmq postgres influxdb; do
    stop_private "$folder/$service" fast
    remove_folder "$folder/$service"
  done
}

demo_children=() demo_folder=

end_demo() {
  local child
  trap '' INT TERM
  for child in "${demo_children[@]}"; do
    if kill -TERM "$child" 2>/dev/null; then wait "$child" || true; fi
  done
  remove_stack "$demo_folder"
}

# begin_demo FOLDER DEFINITIONS: the service and what it needs.
begin_demo() {
  local log=$1/orchestrator.log
  demo_folder=$1
  say "building"
  with_make cargo build --bins --examples
  mkdir -p "$demo_folder"
  trap end_demo EXIT
  trap 'exit 130' INT TERM
  remove_stack "$demo_folder"
  say "starting RabbitMQ, Postgres and InfluxDB of its own"
  private_stack "$demo_folder" ''
  use_private
  export INFLUXDB_HOST=127.0.0.1 INFLUXDB_PORT=$INFLUXDB INFLUXDB_USERNAME=omotes INFLUXDB_PASSWORD=secret
  export WORKFLOW_CONFIG_PATH=$2
  HTTP_BIND=127.0.0.1:$(free_port)
  export HTTP_BIND
  target/debug/omotes-orchestrator run 2>"$log" & demo_children+=($!)
  wait_until 60 "the orchestrator is ready" target/debug/omotes-orchestrator healthcheck \
    || { tail -n 30 "$log" >&2; exit 1; }
  say "the orchestrator is ready; its page: http://$HTTP_BIND/"
}

demo() {
  local log=target/demo/orchestrator.log status=0 task
  begin_demo target/demo examples/optimise_and_simulate.json
  for task in optimiser simulator; do
    target/debug/examples/worker --workflow "$task" --seconds 3 2>"target/demo/$task.log" & demo_children+=($!)
  done
  say "submitting examples/district.esdl: to be optimised, then simulated"
  # In the foreground, so that Ctrl-C reaches it and cancels the job.
  target/debug/omotes-orchestrator submit examples/district.esdl --workflow optimise_and_simulate \
    --reference demo --output target/demo/result.esdl || status=$?
  say "what the orchestrator said of it ($log):"
  grep ' job ' "$log" >&2 || true
  say "what is kept of its steps:"
  target/debug/omotes-orchestrator jobs show "$(sed -n 's/.* job \([0-9a-f-]*\) .*/\1/p' "$log" | head -n 1)" >&2 || true
  return "$status"
}

TESTS=target/test-services

# make_venv FOLDER REQUIREMENT...: a Python environment, made anew when its requirements change.
make_venv() {
  local folder=target/venv/$1; shift
  if [ "$(cat "$folder/requirements" 2>/dev/null)" != "$*" ]; then
    rm -rf "$folder"
    python3 -m venv "$folder" \
      && "$folder/bin/pip" install --quiet --disable-pip-version-check "$@" \
      && echo "$*" >"$folder/requirements"
  fi
}

make_venv_of_newest_sdk() { make_venv sdk-4.3 'omotes-sdk-python==4.3.7' 'celery==5.7.*'; }

make_venvs() {
  mkdir -p target/venv
  # The oldest and the newest that deployments have, and what the recorded messages came from.
  make_venv sdk-4.1 'omotes-sdk-python==4.1.*' 'celery==5.3.*'
  make_venv sdk-4.2 'omotes-sdk-python==4.2.*' 'celery==5.4.*'
  make_venv_of_newest_sdk
  # What the Python orchestrator keeps its tables with.
  make_venv alembic 'alembic==1.13.*' 'sqlalchemy==2.0.*' 'psycopg2-binary==2.9.*'
  # What the status page is held against: axe-core, which is in this package.
  make_venv axe --no-deps 'axe-playwright-python==0.1.8'
}

test_trees() {
  echo "export OMOTES_RABBITMQ_TREE=${OMOTES_RABBITMQ_TREE:-} OMOTES_POSTGRES_TREE=${OMOTES_POSTGRES_TREE:-}"
}

start_test_services() {
  # Those that were kept may be of another version.
  if grep -qxF "$(test_trees)" "$TESTS/env" 2>/dev/null; then
    # shellcheck source=/dev/null
    . "$TESTS/env"
    if answers "$OMOTES_TEST_RABBITMQ_PORT" && answers "$OMOTES_TEST_POSTGRES_PORT" \
      && answers "$OMOTES_TEST_INFLUXDB_PORT"; then
      kept=yes
      return
    fi
  fi
  remove_stack "$TESTS"
  private_stack "$TESTS" management
  cat >"$TESTS/env" <<EOF
export OMOTES_TEST_RABBITMQ_PORT=$RABBITMQ OMOTES_TEST_RABBITMQ_MANAGEMENT_PORT=$MANAGEMENT
export OMOTES_TEST_RABBITMQ_USER=omotes OMOTES_TEST_RABBITMQ_PASSWORD=secret
export OMOTES_TEST_POSTGRES_PORT=$POSTGRES OMOTES_TEST_POSTGRES_USER=omotes OMOTES_TEST_POSTGRES_PASSWORD=secret
export OMOTES_TEST_INFLUXDB_PORT=$INFLUXDB OMOTES_TEST_INFLUXDB_USER=omotes OMOTES_TEST_INFLUXDB_PASSWORD=secret
export OMOTES_TEST_VENVS=$PWD/target/venv
export OMOTES_TEST_AXE=$(ls "$PWD"/target/venv/axe/lib/python3*/site-packages/axe_playwright_python/axe.min.js)
$(test_trees)
EOF
  # shellcheck source=/dev/null
  . "$TESTS/env"
}

stop_test_services() {
  remove_stack "$TESTS"
  rm -f "$TESTS/env"
}

kept='' # Whether the test services outlive this run.

# use_servers RABBITMQ,POSTGRES, or `newest`: those of the Debians that have these versions.
use_servers() {
  local rabbitmq=${1%,*} postgres=${1#*,} rabbitmq_tree postgres_tree
  # shellcheck source=tests/servers/trees.sh
  . tests/servers/trees.sh
  if ! { release_with rabbitmq-server "$rabbitmq" && release_with postgresql "$postgres"; } >/dev/null; then
    die "--servers $1: expected such as 4.0,17, or newest; see ./run.sh --help"
  fi
  if ! is_root || ! command -v apt-get >/dev/null || ! command -v unshare >/dev/null; then
    say "left out: $1: only root on a Debian can make trees of others"
    return 1
  fi
  if ! { (need debootstrap) && rabbitmq_tree=$(tree_with rabbitmq-server "$rabbitmq") \
    && postgres_tree=$(tree_with postgresql "$postgres"); }; then
    say "left out: $1"
    return 1
  fi
  export OMOTES_RABBITMQ_TREE=$rabbitmq_tree OMOTES_POSTGRES_TREE=$postgres_tree
  say "RabbitMQ $(version_in "$rabbitmq_tree" rabbitmq-server), Postgres $(version_in "$postgres_tree" postgresql)"
}

run_tests() {
  local servers='' targets=(--all-targets)
  while :; do
    case ${1:-} in
      --stop) stop_test_services; return ;;
      --keep) kept=yes ;;
      --pooler) export OMOTES_TEST_POOLER=transaction ;;
      --short) targets=(--test integration) ;;
      --servers) servers=${2:?the versions of RabbitMQ and Postgres}; shift ;;
      *) break ;;
    esac
    shift
  done
  # Without what takes minutes to make messages of 64 MiB.
  if [ "${targets[0]}" = --test ]; then
    set -- "$@" -- pipeline:: crashes:: servers:: rabbitmq4:: --skip large_messages_pass
  fi
  need rabbitmq-server postgresql influxdb curl python3-venv chromium chromium-driver pgbouncer \
    prometheus
  if [ -n "$servers" ]; then use_servers "$servers" || return 0; fi
  mkdir -p "$TESTS"
  trap '[ -n "$kept" ] || stop_test_services' EXIT
  trap 'exit 130' INT TERM
  make_venvs & local venvs=$!
  with_make cargo test --all-targets --no-run
  # The tests run it; among all targets it is built as a test of its own only.
  with_make cargo build --example worker
  wait "$venvs" || die "the Python environments could not be made"
  start_test_services
  # Most of a test is waiting, so more of them than there are cores.
  RUST_BACKTRACE=1 RUST_TEST_THREADS=${RUST_TEST_THREADS:-6} cargo test --locked "${targets[@]}" "$@"
}

DRIVEN=(rabbitmq node-2/rabbitmq node-3/rabbitmq postgres standby/postgres)

# What has to be there before a program drives replicas, also of the network; only its help for somebody
# who asks for that.
# Where it has been built is in BUILT, which a run of this script in networks of its own inherits.
ready_to_drive() {
  local name=$1 server
  shift
  need rabbitmq-server postgresql
  say "building"
  export BUILT=target/release
  case " $* " in
    *" --dev "*) BUILT=target/debug; with_make cargo build --bin omotes-orchestrator --example "$name" ;;
    *) with_make cargo build --release --bin omotes-orchestrator --example "$name" ;;
  esac
  case " $* " in *" --help "* | *" -h "*) exec "$BUILT/examples/$name" --help ;; esac
  # What a run has left that was killed. Its servers have gone with it if they had networks of their own:
  # their process ids are somebody else's by now.
  for server in "${DRIVEN[@]}"; do
    if [ -f "target/$name/$server.network" ]; then remove_folder "target/$name/$server"
    else private remove "$PWD/target/$name/$server"
    fi
  done
  rm -rf "target/$name"/{*.extra,*.network,node-*,standby,networks}
}

# Servers of its own for a program that drives replicas, and the environment of those.
drive() {
  local name=$1 folder=$PWD/target/$1 server
  driven=target/$name
  end_drive() {
    trap '' INT TERM
    for server in "${DRIVEN[@]}"; do private remove "$driven/$server"; done
    rm -f "$driven/"{,node-2/,node-3/,standby/}*.network
  }
  trap end_drive EXIT
  trap 'exit 130' INT TERM
  mkdir -p "$folder"
  rm -f "$folder"/replica-*.log
  RABBITMQ=$(free_port) POSTGRES=$(free_port)
  say "starting RabbitMQ and Postgres of its own"
  private start "$folder/rabbitmq" "$RABBITMQ"
  private start "$folder/postgres" "$POSTGRES"
  use_private
  export INFLUXDB_HOST='' HTTP_BIND=127.0.0.1:0
  export WORKFLOW_CONFIG_PATH=$folder/workflows.json
  cat >"$WORKFLOW_CONFIG_PATH" <<JSON
[
  {"workflow_type_name": "$name", "workflow_type_description_name": "$name"},
  {"workflow_type_name": "${name}_steps", "workflow_type_description_name": "The same task twice",
   "workflow_parameters": [{"key_name": "first", "parameter_type": "string"},
                           {"key_name": "second", "parameter_type": "string"}],
   "steps": [{"task": "$name", "parameters": {"behaviour": "first", "step": {"value": 1}}},
             {"task": "$name", "parameters": {"behaviour": "second", "step": {"value": 2}}}]},
  {"workflow_type_name": "${name}_held", "workflow_type_description_name": "Paused", "paused": true},
  {"workflow_type_name": "${name}_crew", "workflow_type_description_name": "Computes until it is killed",
   "steps": [{"task": "${name}_crew", "parameters": {"behaviour": {"value": "compute"}}}]},
  {"workflow_type_name": "${name}_seats", "workflow_type_description_name": "With seats",
   "max_running": 1000000}
]
JSON
}

# What the first node of a cluster has to know before it starts.
cluster_of_three_first() {
  mkdir -p "$1/rabbitmq.extra"
  cat >"$1/rabbitmq.extra/exports" <<EXPORTS
export ERL_EPMD_PORT=$(free_port)
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-setcookie omotes' RABBITMQ_CTL_ERL_ARGS='-setcookie omotes'
EXPORTS
  {
    echo "cluster_partition_handling = pause_minority"
    # Cut off for longer than this, in seconds, nodes are down for each other.
    if [ -f "$1/rabbitmq.network" ]; then echo "net_ticktime = 8"; fi
  } >"$1/rabbitmq.extra/conf"
}

# Two nodes more, the queues of examples/deployment/cluster, and a standby of Postgres.
cluster_of_three() {
  local folder=$PWD/$1 number port nodes first prefix
  first=$(network_of "$folder/rabbitmq"; echo "omotes$RABBITMQ@$NODE_HOST")
  nodes=$(address_of "$folder/rabbitmq"):$RABBITMQ
  for number in 2 3; do
    port=$(free_port)
    mkdir -p "$folder/node-$number/rabbitmq.extra"
    cp "$folder/rabbitmq.extra/exports" "$folder/node-$number/rabbitmq.extra/"
    {
      cat "$folder/rabbitmq.extra/conf"
      echo "cluster_formation.peer_discovery_backend = classic_config"
      echo "cluster_formation.classic_config.nodes.1 = $first"
      echo "cluster_formation.classic_config.nodes.2 = $(
        network_of "$folder/node-$number/rabbitmq"; echo "omotes$port@$NODE_HOST")"
    } >"$folder/node-$number/rabbitmq.extra/conf"
    private start "$folder/node-$number/rabbitmq" "$port"
    nodes+=,$(address_of "$folder/node-$number/rabbitmq"):$port
  done
  cp examples/deployment/cluster/definitions.json "$folder/rabbitmq/cluster.json"
  chmod 644 "$folder/rabbitmq/cluster.json"
  private ctl "$folder/rabbitmq" -q import_definitions "$(cd "$folder/rabbitmq" && pwd -P)/cluster.json" >&2
  port=$(free_port)
  private standby "$folder/standby/postgres" "$port" "$folder/postgres" "$POSTGRES"
  for prefix in SDK TASK CELERY; do export "${prefix}_RABBITMQ_HOSTNAME=$nodes"; done
  POSTGRESQL_HOST=$(address_of "$folder/postgres"),$(address_of "$folder/standby/postgres")
  export POSTGRESQL_HOST POSTGRESQL_PORT=$POSTGRES,$port
}

# stub TASK: a worker that begins anew when a job has made it crash.
stub() {
  local worker
  trap 'kill -TERM "$worker" 2>/dev/null; wait "$worker" || true; exit 0' TERM
  while true; do
    target/debug/examples/worker --workflow "$1" & worker=$!
    if wait "$worker"; then return; fi
  done
}

dev() {
  local definitions=${1:-examples/development.json} task outcome own=",${OWN:-},"
  begin_demo target/dev "$definitions"
  for task in $(target/debug/omotes-orchestrator workflows list --tasks); do
    case $own in *",$task,"*) say "left to a worker of yours: $task"; continue ;; esac
    stub "$task" 2>"target/dev/$task.log" & demo_children+=($!)
    say "a stub works on $task"
  done
  env | grep -E '^((SDK|TASK|CELERY)_RABBITMQ|POSTGRESQL|INFLUXDB|WORKFLOW_CONFIG|HTTP_BIND)_?' | sort >target/dev/env
  cat >&2 <<'EOF'

In another terminal:
  set -a; . target/dev/env; set +a
  target/debug/omotes-orchestrator submit examples/district.esdl --workflow simulate --param outcome=fail
  target/debug/omotes-orchestrator jobs watch

EOF
  if [ $# = 0 ]; then
    for outcome in succeed fail crash; do
      target/debug/omotes-orchestrator submit examples/district.esdl --workflow simulate \
        --reference "sample: $outcome" --param "outcome=$outcome" >/dev/null 2>&1 & demo_children+=($!)
    done
  fi
  if command -v xdg-open >/dev/null && [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
    xdg-open "http://$HTTP_BIND/" >/dev/null 2>&1 || true
  fi
  say "What the orchestrator says; Ctrl-C ends all:"
  tail -n +1 -f target/dev/orchestrator.log >&2 & demo_children+=($!)
  wait "${demo_children[0]}"
}

servers_asked_for() {
  local argument before=''
  for argument; do
    if [ "$before" = --servers ]; then echo "$argument"; fi
    before=$argument
  done
}

# The orchestrator among failures of everything around it; see examples/chaos.
chaos() {
  local why servers networks=()
  # shellcheck source=examples/chaos/network.sh
  . examples/chaos/network.sh
  if [ -n "${OMOTES_IN_NETWORKS:-}" ]; then
    networks=(--networks)
    make_networks "$PWD/target/chaos" "${DRIVEN[@]}"
  else
    ready_to_drive chaos "$@"
    servers=$(servers_asked_for "$@")
    if [ -n "$servers" ]; then use_servers "$servers" || return 0; fi
  fi
  case " $* " in
    *" --cluster "*)
      if [ ${#networks[@]} = 0 ]; then
        why=$(hinders_networks)
        [ -n "$why" ] || { OMOTES_IN_NETWORKS=yes in_own_networks "$HERE/run.sh" chaos "$@"; return; }
        say "left out: cutting the network of servers ($why); nodes are cut off by their cookies instead"
      fi
      cluster_of_three_first target/chaos
      drive chaos
      cluster_of_three target/chaos ;;
    *) drive chaos ;;
  esac
  export TIMEOUT_JOB_HANDLER_RERUN_SEC=1 TIMEOUT_JOB_MANAGER_START_BUFFER_SEC=0 OUTCOME_LOST_SEC=60
  # In there the signal to end comes to this script alone.
  ${networks:+run_child} "$BUILT/examples/chaos" --folder "$PWD/target/chaos" \
    --program "$BUILT/omotes-orchestrator" "${networks[@]}" "$@" 2>target/chaos/chaos.log
}

# See examples/bench.
bench() {
  ready_to_drive bench "$@"
  case " $* " in *" workers "*)
    need python3-venv
    make_venvs || die "the Python environments could not be made" ;;
  esac
  drive bench
  "$BUILT/examples/bench" --folder "$PWD/target/bench" --program "$BUILT/omotes-orchestrator" "$@"
}

# See tests/containers. In the environment of the newest SDK, whose clients and workers it runs.
containers() {
  need python3-venv
  mkdir -p target/venv
  make_venv_of_newest_sdk || { say "left out: the SDK cannot be installed from PyPI"; return; }
  exec target/venv/sdk-4.3/bin/python tests/containers "$@"
}

lint() {
  cargo fmt --check
  cargo clippy --locked --all-targets -- -D warnings
  RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --quiet
  if command -v shellcheck >/dev/null; then shellcheck run.sh .ci/run examples/chaos/network.sh tests/servers/* tests/containers/*/*.sh tests/containers/*/*/start examples/deployment/switch.sh examples/answers/{desk,plant,outage}; else say "shellcheck is not installed: skipped"; fi
  if command -v cargo-deny >/dev/null; then cargo deny check; else say "cargo-deny is not installed: skipped"; fi
}

case ${1:-} in
  -h | --help | help) usage ;;
  demo) demo ;;
  dev) shift; dev "$@" ;;
  services) shift; services "$@" ;;
  test) shift; run_tests "$@" ;;
  chaos) shift; chaos "$@" ;;
  bench) shift; bench "$@" ;;
  containers) shift; containers "$@" ;;
  lint) lint ;;
  private) shift; private "$@" ;;
  '' | -*) start "$@" ;;
  *) usage >&2; exit 2 ;;
esac

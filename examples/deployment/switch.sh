#!/usr/bin/env bash
# Exchanges the orchestrator of a docker compose deployment; see switch.md.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: OUR_IMAGE=… PYTHON_IMAGE=… switch.sh here|back [--force]

  here      this project's orchestrator takes the place of the Python service
  back      the Python service takes the place of this project's orchestrator
  --force   goes on despite warnings and errors

In the folder of the deployment, whose compose file names the image by a variable of .env. Variables:
  OUR_IMAGE, PYTHON_IMAGE   the images of the two
  VARIABLE                  the variable of .env with the image (ORCHESTRATOR_IMAGE)
  SERVICE                   the service in the compose file (orchestrator)
  REPLICAS                  how many of this project's are to run (1)
  COMPOSE                   how compose is called (docker compose)
EOF
}

say() { printf 'switch.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

VARIABLE=${VARIABLE:-ORCHESTRATOR_IMAGE} SERVICE=${SERVICE:-orchestrator} REPLICAS=${REPLICAS:-1}
read -r -a compose <<<"${COMPOSE:-docker compose}"

direction=${1:-} force=''
case $direction in
  here) new=${OUR_IMAGE:?} ;;
  back) new=${PYTHON_IMAGE:?} REPLICAS=1 ;;
  -h | --help) usage; exit ;;
  *) usage >&2; exit 2 ;;
esac
case ${2:-} in
  '') ;;
  --force) force=yes ;;
  *) usage >&2; exit 2 ;;
esac
grep -q "^$VARIABLE=" .env || die "$PWD/.env has no $VARIABLE: name the image of the service $SERVICE by it"
old=$(sed -n "s/^$VARIABLE=//p" .env | tail -n 1)
[ "$old" != "$new" ] || die "$VARIABLE is $new already"

# What `doctor` finds, in a container of this project's image that has the service's environment. Into `found`.
look() {
  # It exits with 1 when it has found something.
  found=$(env "$VARIABLE=${OUR_IMAGE:?}" "${compose[@]}" run --rm -T --no-deps --entrypoint omotes-orchestrator \
    "$SERVICE" doctor --before-switch="$direction" || true)
  [[ $found == *Switch* ]] || die "doctor did not run${found:+: $found}"
}

# What is more than in order, with what to do about it.
show() { awk '/^[a-z]/ { shown = $1 != "ok" } shown' <<<"$found" >&2; }

# The lines of these severities, without one about an orchestrator that runs where that is as it should be.
# Jobs that wait for a worker stay in RabbitMQ, whichever service runs.
bad() { grep -E "^($1) " <<<"$found" | grep -v -e "Switch  *an orchestrator runs" -e "which has no worker$" || true; }

runs() { grep -q "Switch  *an orchestrator runs" <<<"$found"; }

say "before: $old runs"
look
show
[ -z "$(bad error)" ] || [ -n "$force" ] || die "nothing has been changed; put the errors right, or use --force"

say "stopping $old"
"${compose[@]}" stop --timeout 30 "$SERVICE"
say "no orchestrator runs"
look
show
if [ -z "$force" ] && { runs || [ -n "$(bad 'warning|error')" ]; }; then
  "${compose[@]}" start "$SERVICE"
  die "started $old again; put the warnings and errors right, or use --force"
fi

say "starting $new"
sed -i "s|^$VARIABLE=.*|$VARIABLE=$new|" .env
"${compose[@]}" up -d --no-deps --no-build --force-recreate --scale "$SERVICE=$REPLICAS" "$SERVICE"
for _ in {1..60}; do
  look
  if runs; then
    show
    say "after: $new runs"
    exit
  fi
  sleep 1
done
"${compose[@]}" logs --tail 40 "$SERVICE" >&2
die "$new does not consume its queues; look at its log, or put $VARIABLE=$old into .env and start that again"

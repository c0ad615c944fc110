#!/bin/sh
# The vhosts and their users: OMOTES's setup does this by hand. Run in RabbitMQ's container, as
# `rabbitmq-init.sh OMOTES_PASSWORD CELERY_PASSWORD`.
set -eu
for vhost in omotes omotes_celery; do rabbitmqctl -q add_vhost "$vhost"; done
rabbitmqctl -q add_user omotes "$1"
rabbitmqctl -q add_user celery "$2"
rabbitmqctl -q set_permissions -p omotes omotes '.*' '.*' '.*'
rabbitmqctl -q set_permissions -p omotes_celery celery '.*' '.*' '.*'

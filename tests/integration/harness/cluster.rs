//! A cluster of two RabbitMQ nodes for one test, which may stop each of them.

use std::fs;
use std::path::Path;

use super::deployment::{Deployment, Server, eventually, free_port, has_khepri};

/// Two nodes. A classic queue is on the node that it was declared on.
pub struct Cluster {
    /// With the test's Postgres.
    pub one: Deployment,
    pub other: Deployment,
    /// With Khepri what the nodes know of each other takes a majority of them.
    third: Option<Deployment>,
}

impl Cluster {
    pub fn start() -> Cluster {
        let names = free_port();
        let prepare = |folder: &Path| {
            // As they would be on one host, and in one deployment.
            let exports = format!(
                "export ERL_EPMD_PORT={names}\n\
                 export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-setcookie omotes'\n\
                 export RABBITMQ_CTL_ERL_ARGS='-setcookie omotes'\n"
            );
            fs::write(folder.join("exports"), exports).unwrap();
        };
        let one = Deployment::with_own(&Server::ALL, |one| {
            prepare(&one.extra_folder(Server::RabbitMq));
        });
        let join = |joining: &Deployment| {
            let folder = joining.extra_folder(Server::RabbitMq);
            prepare(&folder);
            let nodes = format!(
                "cluster_formation.peer_discovery_backend = classic_config\n\
                 cluster_formation.classic_config.nodes.1 = {}\n\
                 cluster_formation.classic_config.nodes.2 = {}\n",
                node(&one),
                node(joining)
            );
            fs::write(folder.join("conf"), nodes).unwrap();
        };
        let other = Deployment::with_own(&[Server::RabbitMq], join);
        let third = has_khepri().then(|| Deployment::with_own(&[Server::RabbitMq], join));
        let cluster = Cluster { one, other, third };
        assert_eq!(cluster.running(), cluster.nodes());
        cluster
    }

    fn nodes(&self) -> String {
        (2 + usize::from(self.third.is_some())).to_string()
    }

    fn running(&self) -> String {
        self.eval("length(rabbit_nodes:all_running()).")
    }

    /// What Erlang code comes to on the first node.
    pub fn eval(&self, code: &str) -> String {
        let value = self.one.rabbitmqctl(&["eval", code]);
        value.trim().to_owned()
    }

    /// Kills the other node while messages for its queues are on their way, at least so many.
    pub fn kill_other_meanwhile(&self, unconfirmed: usize, send: impl FnOnce()) {
        self.other.signal_rabbitmq("-STOP");
        send();
        // A channel that has asked the other node something does not answer itself.
        let code = "Ask = fun(Channel) -> Self = self(), \
                        spawn(fun() -> Self ! {Channel, \
                            rabbit_channel:info(Channel, [messages_unconfirmed])} end), \
                        receive {Channel, [{_, Count}]} -> Count after 500 -> 0 end end, \
                    lists:sum([Ask(Channel) || Channel <- rabbit_channel:list_local()]).";
        eventually("messages are on their way", || {
            let on_their_way: usize = self.eval(code).parse().unwrap();
            (on_their_way >= unconfirmed).then_some(())
        });
        self.other.kill_server(Server::RabbitMq);
    }

    /// How many connections of clients the other node has.
    pub fn connections_of_other(&self) -> usize {
        // It is named otherwise since RabbitMQ 4.0.
        let code = "length(case erlang:function_exported(rabbit_networking, local_connections, 0) of \
                        true -> rabbit_networking:local_connections(); \
                        false -> rabbit_networking:connections_local() end).";
        let count = self.other.rabbitmqctl(&["eval", code]);
        count.trim().parse().unwrap()
    }

    /// Lets the first node look for the process of a queue whose node it knows to be down, as
    /// RabbitMQ does of itself that has Khepri: it rejects what is published, and whoever asks about
    /// the queue waits for a minute.
    pub fn presume(&self, vhost: &str, queue: &str) {
        if has_khepri() {
            return;
        }
        let code = format!(
            "N = rabbit_misc:r(<<\"{vhost}\">>, queue, <<\"{queue}\">>), \
             [Q] = mnesia:dirty_read(rabbit_durable_queue, N), mnesia:dirty_write(rabbit_queue, Q)."
        );
        assert_eq!(self.eval(&code), "ok");
    }

    pub fn kill_other(&self) {
        self.other.kill_server(Server::RabbitMq);
        let all = self.nodes();
        eventually("it is missed", || (self.running() != all).then_some(()));
    }

    pub fn start_other(&self) {
        self.other.start_server(Server::RabbitMq);
    }
}

/// The name of a deployment's node.
fn node(deployment: &Deployment) -> String {
    format!("omotes{}@localhost", deployment.rabbitmq_port())
}

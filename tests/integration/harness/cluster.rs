//! A cluster of RabbitMQ nodes for one test, which may stop each of them.

use std::fs;
use std::path::Path;

use super::deployment::{Deployment, Server, eventually, free_port, has_khepri};

/// Two nodes or three. A classic queue is on the node that it was declared on.
pub struct Cluster {
    /// With the test's Postgres.
    pub one: Deployment,
    pub other: Deployment,
    pub third: Option<Deployment>,
}

impl Cluster {
    pub fn start() -> Cluster {
        Cluster::with(false, "")
    }

    /// Whose nodes take one that hangs for gone after 9 to 15 seconds instead of 45 to 75.
    pub fn start_impatient() -> Cluster {
        Cluster::with(false, "net_ticktime = 12")
    }

    /// With these lines in the configuration of each.
    pub fn of_three(configuration: &str) -> Cluster {
        Cluster::with(true, configuration)
    }

    fn with(has_third: bool, configuration: &str) -> Cluster {
        let names = free_port();
        let prepare = |folder: &Path| {
            // As they would be on one host, and in one deployment.
            let exports = format!(
                "export ERL_EPMD_PORT={names}\n\
                 export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-setcookie omotes'\n\
                 export RABBITMQ_CTL_ERL_ARGS='-setcookie omotes'\n"
            );
            fs::write(folder.join("exports"), exports).unwrap();
            fs::write(folder.join("conf"), configuration).unwrap();
        };
        let one = Deployment::with_own(&Server::ALL, |one| {
            prepare(&one.extra_folder(Server::RabbitMq));
        });
        let join = || {
            Deployment::with_own(&[Server::RabbitMq], |joining| {
                let folder = joining.extra_folder(Server::RabbitMq);
                prepare(&folder);
                let nodes = format!(
                    "{configuration}\n\
                     cluster_formation.peer_discovery_backend = classic_config\n\
                     cluster_formation.classic_config.nodes.1 = {}\n\
                     cluster_formation.classic_config.nodes.2 = {}\n",
                    node(&one),
                    node(joining)
                );
                fs::write(folder.join("conf"), nodes).unwrap();
            })
        };
        let other = join();
        let third = (has_third || has_khepri()).then(join);
        let cluster = Cluster { one, other, third };
        cluster.all_run();
        cluster
    }

    /// Variables that name all nodes for each vhost.
    pub fn all_nodes(&self) -> Vec<(String, String)> {
        let nodes = [&self.one, &self.other].into_iter().chain(&self.third);
        let hosts: Vec<_> = nodes
            .map(|node| format!("127.0.0.1:{}", node.rabbitmq_port()))
            .collect();
        let names = ["SDK", "TASK", "CELERY"].map(|vhost| format!("{vhost}_RABBITMQ_HOSTNAME"));
        names.map(|name| (name, hosts.join(","))).into()
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

    pub fn all_run(&self) {
        let all = 2 + usize::from(self.third.is_some());
        eventually("all nodes run", || {
            (self.running() == all.to_string()).then_some(())
        });
    }

    /// The other node and all others refuse each other from now on, by their cookies; whoever is connected to
    /// them stays so, as far as RabbitMQ lets them.
    pub fn cut_off_other(&self) {
        let others = [&self.one].into_iter().chain(&self.third);
        let names: Vec<_> = others.map(|one| format!("'{}'", node(one))).collect();
        let code = format!(
            "[begin erlang:set_cookie(N, strangers), erlang:disconnect_node(N) end || N <- [{}]].",
            names.join(",")
        );
        self.other.rabbitmqctl(&["eval", &code]);
    }

    /// Has the other node lead what decides about queues and bindings, where one of them does.
    pub fn let_other_lead(&self) {
        if !has_khepri() {
            return;
        }
        let other = format!("{{rabbitmq_metadata, '{}'}}", node(&self.other));
        let own = "{rabbitmq_metadata, node()}";
        let leads = format!("element(3, ra:members({own})) =:= {other}.");
        eventually("it leads", || {
            self.eval(&format!("ra:transfer_leadership({own}, {other})."));
            (self.eval(&leads) == "true").then_some(())
        });
    }

    /// Whether a queue has a consumer that is connected to this deployment's node.
    pub fn is_consumed_on(&self, deployment: &Deployment, vhost: &str, queue: &str) -> bool {
        let list = [
            "list_consumers",
            "-q",
            "-p",
            vhost,
            "queue_name",
            "channel_pid",
        ];
        let consumers = self.one.rabbitmqctl(&list);
        let node = node(deployment);
        let mut lines = consumers.lines();
        lines.any(|line| line.starts_with(&format!("{queue}\t")) && line.contains(&node))
    }

    pub fn start_other(&self) {
        self.other.start_server(Server::RabbitMq);
    }
}

/// The name of a deployment's node.
fn node(deployment: &Deployment) -> String {
    format!("omotes{}@localhost", deployment.rabbitmq_port())
}

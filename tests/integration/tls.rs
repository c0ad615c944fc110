//! RabbitMQ and Postgres in TLS, with certificates of an authority that the test makes.

use std::collections::HashSet;
use std::net::TcpListener;
use std::process::Stdio;

use omotes_orchestrator::wire::{JobSubmission, job_result::ResultType};

use crate::guarded_stream::{Poison, send_submissions};
use crate::harness::authority::{Authority, write};
use crate::harness::deployment::{Deployment, Server, Service, eventually};
use crate::harness::peers::{Client, Task, Worker, kept_its_session, running_job};

const MIB: usize = 1024 * 1024;

type Variables<'a> = &'a [(&'a str, &'a str)];

/// Servers that show a certificate for `localhost`. RabbitMQ has a port for TLS, where it wants a
/// certificate of its clients too, beside the one for the test's own clients and workers.
struct Secured {
    deployment: Deployment,
    amqps: u16,
}

impl Secured {
    fn new(servers: &[Server], postgres_access: &str) -> Secured {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let amqps = listener.local_addr().unwrap().port();
        drop(listener);
        let deployment = Deployment::with_own(servers, |deployment| {
            let authority = Authority::new();
            let server = authority.issue("localhost");
            for one in [Server::RabbitMq, Server::Postgres] {
                let folder = deployment.extra_folder(one);
                write(&folder, "ca.pem", &authority.pem());
                write(&folder, "server.pem", &server.certificate);
                write(&folder, "server.key", &server.key);
            }
            write(
                &deployment.extra_folder(Server::RabbitMq),
                "conf",
                &format!(
                    "listeners.ssl.1 = 127.0.0.1:{amqps}\n\
                     ssl_options.cacertfile = ca.pem\n\
                     ssl_options.certfile = server.pem\n\
                     ssl_options.keyfile = server.key\n\
                     ssl_options.verify = verify_peer\n\
                     ssl_options.fail_if_no_peer_cert = true\n"
                ),
            );
            let postgres = deployment.extra_folder(Server::Postgres);
            write(
                &postgres,
                "conf",
                "ssl = on\n\
                 ssl_ca_file = '../ca.pem'\n\
                 ssl_cert_file = '../server.pem'\n\
                 ssl_key_file = '../server.key'\n\
                 hba_file = 'access'\n",
            );
            write(&postgres, "access", postgres_access);
            // And what the service is given.
            let client = authority.issue("orchestrator");
            write(&deployment.folder, "ca.pem", &authority.pem());
            write(&deployment.folder, "stranger.pem", &Authority::new().pem());
            write(&deployment.folder, "client.pem", &client.certificate);
            write(&deployment.folder, "client.key", &client.key);
            write(&deployment.folder, "password", "secret\n");
        })
        // TLS would end at the pooler.
        .without_pooler();
        Secured { deployment, amqps }
    }

    fn path(&self, name: &str) -> String {
        self.deployment.folder.join(name).display().to_string()
    }

    /// A service that uses TLS for everything, trusts nobody else, and has its passwords from a
    /// file; but for the variables that are `changed`, where `@name` stands for a file of the test.
    fn launch(&self, changed: Variables<'_>) -> Service {
        let mut command = self.deployment.command(&["run"]);
        for prefix in ["SDK", "TASK", "CELERY"] {
            let name = |suffix| format!("{prefix}_RABBITMQ_{suffix}");
            command
                .env_remove(name("PASSWORD"))
                .env(name("PASSWORD_FILE"), self.path("password"))
                .env(name("HOSTNAME"), "localhost")
                .env(name("PORT"), self.amqps.to_string())
                .env(name("TLS"), "true")
                .env(name("TLS_CA_FILE"), self.path("ca.pem"))
                .env(name("TLS_CERT_FILE"), self.path("client.pem"))
                .env(name("TLS_KEY_FILE"), self.path("client.key"));
        }
        command
            .env_remove("POSTGRESQL_PASSWORD")
            .env("POSTGRESQL_PASSWORD_FILE", self.path("password"))
            .env("POSTGRESQL_HOST", "localhost")
            .env("POSTGRESQL_SSLMODE", "verify-full")
            .env("POSTGRESQL_SSLROOTCERT", self.path("ca.pem"))
            .env("POSTGRESQL_SSLCERT", self.path("client.pem"))
            .env("POSTGRESQL_SSLKEY", self.path("client.key"));
        for (name, value) in changed {
            command.env(name, self.resolve(value));
        }
        self.deployment.launch_command(command)
    }

    fn resolve(&self, value: &str) -> String {
        match value.strip_prefix('@') {
            Some(file) => self.path(file),
            None => value.to_owned(),
        }
    }
}

/// Everybody in TLS and with a certificate; the test itself connects without.
const CERTIFICATES: &str = "hostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n\
                            hostnossl all all 127.0.0.1/32 scram-sha-256\n";

fn esdl(bytes: usize) -> String {
    format!("<e id='large'>{}</e>", "x".repeat(bytes))
}

#[test]
fn jobs_go_through_in_tls_large_or_many() {
    let secured = Secured::new(&[Server::RabbitMq, Server::Postgres], CERTIFICATES);
    let deployment = &secured.deployment;
    let service = secured.launch(&[]);
    service.wait_until_ready();
    let connections = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                       WHERE application_name = 'omotes_orchestrator'";
    assert!(
        deployment.count(&format!(
            "{connections} AND ssl AND client_dn LIKE '%orchestrator%'"
        )) > 0
    );
    assert_eq!(deployment.count(&format!("{connections} AND NOT ssl")), 0);
    let client = Client::new(deployment);
    let worker = Worker::new(deployment, "workflow_1");

    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let input = esdl(12 * MIB);
    client.send(&JobSubmission {
        esdl: input.clone(),
        ..submission
    });
    let message = worker.take_message();
    let body = String::from_utf8(message.body.clone()).unwrap();
    assert!(body.contains(&input["<e id='large'>".len()..]));
    let task = Task::of(&message);
    worker.start(&task);
    worker.progress(&task, 0.5);
    assert_eq!(client.progress(job).0, 0.5);
    let output = esdl(13 * MIB);
    worker.succeed(&task, &output);
    assert!(client.result(job).output_esdl.as_deref() == Some(output.as_str()));

    // More than may be in hand, while nothing gets through.
    let tasks: Vec<_> = (0..20)
        .map(|_| running_job(&client, &worker, None))
        .collect();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    for task in &tasks {
        worker.succeed(task, &output);
    }
    service.logged("has been waiting for Postgres");
    let peak = service.peak_memory();
    eprintln!("peak memory with large messages in TLS: {peak} MiB");
    assert!(peak < 200, "{peak} MiB");
    lock.rollback().unwrap();
    for task in &tasks {
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    deployment.no_jobs_left();

    let mut jobs: Vec<_> = (0..500)
        .map(|_| {
            let (job, submission) = client.submission("workflow_1");
            client.send(&submission);
            job
        })
        .collect();
    let mut taken: Vec<_> = jobs.iter().map(|_| worker.take().job).collect();
    jobs.sort();
    taken.sort();
    assert_eq!(taken, jobs);
    kept_its_session(deployment, &service);
    assert_eq!(deployment.count(&format!("{connections} AND NOT ssl")), 0);
    assert!(service.stop().success());
}

#[test]
fn poisoned_properties_harm_nobody_in_tls_either() {
    let secured = Secured::new(&[Server::RabbitMq, Server::Postgres], CERTIFICATES);
    let deployment = &secured.deployment;
    let service = secured.launch(&[]);
    service.wait_until_ready();
    let client = Client::new(deployment);
    let worker = Worker::new(deployment, "workflow_1");
    for poison in Poison::ALL {
        let mut jobs = send_submissions(deployment, &client, "job_submissions", poison, 3);
        let behind = client.submit("workflow_1");
        jobs.insert(behind);
        let tasks: Vec<_> = jobs.iter().map(|_| worker.take()).collect();
        assert_eq!(
            tasks.iter().map(|task| task.job).collect::<HashSet<_>>(),
            jobs
        );
        for task in &tasks {
            worker.start(task);
            worker.succeed(task, "<e id='out-1'/>");
        }
        assert_eq!(client.outcome(behind).0, ResultType::Succeeded);
    }
    deployment.no_jobs_left();
    kept_its_session(deployment, &service);
}

#[test]
fn what_is_wrong_with_tls_is_told() {
    let secured = Secured::new(&[Server::RabbitMq, Server::Postgres], CERTIFICATES);
    let plain = secured.deployment.rabbitmq_port().to_string();
    let cases: [(Variables<'_>, &str, &str, &str); 7] = [
        (
            &[("SDK_RABBITMQ_TLS_CA_FILE", "@stranger.pem")],
            "broker",
            "RabbitMQ for SDK, consuming (omotes@localhost:",
            "UnknownIssuer",
        ),
        (
            &[("TASK_RABBITMQ_HOSTNAME", "127.0.0.1")],
            "broker",
            "RabbitMQ for TASK, consuming (omotes@127.0.0.1:",
            "not valid for name \"127.0.0.1\"",
        ),
        (
            &[
                ("CELERY_RABBITMQ_TLS_CERT_FILE", ""),
                ("CELERY_RABBITMQ_TLS_KEY_FILE", ""),
            ],
            "broker",
            "RabbitMQ for CELERY, publishing (omotes@localhost:",
            "CertificateRequired",
        ),
        (
            &[("CELERY_RABBITMQ_PORT", &plain)],
            "broker",
            "RabbitMQ for CELERY, publishing (omotes@localhost:",
            "InvalidContentType",
        ),
        (
            &[("POSTGRESQL_SSLROOTCERT", "@stranger.pem")],
            "postgres",
            "localhost:",
            "UnknownIssuer",
        ),
        (
            &[("POSTGRESQL_HOST", "127.0.0.1")],
            "postgres",
            "127.0.0.1:",
            "not valid for name \"127.0.0.1\"",
        ),
        (
            &[("POSTGRESQL_SSLCERT", ""), ("POSTGRESQL_SSLKEY", "")],
            "postgres",
            "localhost:",
            "client certificate",
        ),
    ];
    let launched = cases.map(|(changed, part, connection, cause)| {
        (secured.launch(changed), part, connection, cause)
    });
    for (service, part, connection, cause) in launched {
        eventually(&format!("{connection} and {cause}"), || {
            let (ready, body) = service.readiness()?;
            assert!(!ready);
            let why = body["parts"][part]["why"].as_str()?;
            (why.contains(connection) && why.contains(cause)).then_some(())
        });
    }
}

/// Databases for those in TLS, for those without, and for both.
const DATABASES: &str = "hostssl encrypted all 127.0.0.1/32 scram-sha-256\n\
                         hostnossl encrypted all 127.0.0.1/32 reject\n\
                         hostssl plain all 127.0.0.1/32 reject\n\
                         host all all 127.0.0.1/32 scram-sha-256\n";

#[test]
fn sslmode_does_what_it_does_in_libpq() {
    const REFUSED: &str = "pg_hba.conf rejects connection";
    let secured = Secured::new(&[Server::Postgres], DATABASES);
    let without_tls = Deployment::new();
    let mut sql = secured.deployment.sql();
    sql.batch_execute("CREATE DATABASE encrypted").unwrap();
    sql.batch_execute("CREATE DATABASE plain").unwrap();
    let here = "localhost";
    let elsewhere = "127.0.0.1";
    let mut running = Vec::new();
    // The mode, the authorities, the host, the database or none where the server has no TLS; what is
    // wrong with that.
    for (mode, authorities, host, database, faults) in [
        ("disable", "", here, Some("plain"), &[][..]),
        ("disable", "", here, Some("encrypted"), &[REFUSED]),
        ("disable", "", here, None, &[]),
        ("allow", "", here, Some("plain"), &[]),
        ("allow", "", here, Some("encrypted"), &[]),
        (
            "allow",
            "@stranger.pem",
            here,
            Some("encrypted"),
            &[REFUSED, "with TLS", "UnknownIssuer"],
        ),
        ("allow", "", here, None, &[]),
        ("prefer", "", here, Some("plain"), &[]),
        ("prefer", "", elsewhere, Some("encrypted"), &[]),
        ("prefer", "@ca.pem", elsewhere, Some("encrypted"), &[]),
        ("prefer", "@stranger.pem", here, Some("plain"), &[]),
        (
            "prefer",
            "@stranger.pem",
            here,
            Some("encrypted"),
            &["UnknownIssuer", "without TLS", REFUSED],
        ),
        ("prefer", "", here, None, &[]),
        ("require", "", here, Some("plain"), &[REFUSED]),
        ("require", "", elsewhere, Some("encrypted"), &[]),
        ("require", "@ca.pem", elsewhere, Some("encrypted"), &[]),
        (
            "require",
            "@stranger.pem",
            here,
            Some("encrypted"),
            &["UnknownIssuer"],
        ),
        ("require", "", here, None, &["server does not support TLS"]),
        ("verify-ca", "@ca.pem", elsewhere, Some("encrypted"), &[]),
        (
            "verify-ca",
            "@stranger.pem",
            here,
            Some("encrypted"),
            &["UnknownIssuer"],
        ),
        (
            "verify-ca",
            "@ca.pem",
            here,
            None,
            &["server does not support TLS"],
        ),
        ("verify-full", "@ca.pem", here, Some("encrypted"), &[]),
        (
            "verify-full",
            "@ca.pem",
            elsewhere,
            Some("encrypted"),
            &["not valid for name"],
        ),
        (
            "verify-full",
            "@stranger.pem",
            here,
            Some("encrypted"),
            &["UnknownIssuer"],
        ),
        (
            "verify-full",
            "system",
            here,
            Some("encrypted"),
            &["UnknownIssuer"],
        ),
    ] {
        let what = format!("{mode} {authorities} {host} {database:?}");
        let mut command = match database {
            Some(database) => {
                let mut command = secured.deployment.command(&["db", "current"]);
                command.env("POSTGRESQL_DATABASE", database);
                command
            }
            None => without_tls.command(&["db", "current"]),
        };
        let child = command
            .env("POSTGRESQL_HOST", host)
            .env("POSTGRESQL_SSLMODE", mode)
            .env("POSTGRESQL_SSLROOTCERT", secured.resolve(authorities))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        running.push((what, child, faults));
    }
    for (what, child, faults) in running {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.success(), faults.is_empty(), "{what}: {text}");
        for fault in faults {
            assert!(text.contains(fault), "{what}: {text}");
        }
    }
}

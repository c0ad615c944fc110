use std::fs;

use super::*;
use crate::authority::{Authority, write};
use crate::tls::{Check, Identity, Roots};
use rstest::rstest;
use uuid::Uuid;

fn read(variables: &[(&str, &str)]) -> Result<Config, Faults> {
    Config::read(&|name| {
        variables
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn the_defaults_are_those_in_force() {
    let config = read(&[]).unwrap();
    assert_eq!(config.sdk_rabbitmq, config.celery_rabbitmq);
    assert_eq!(
        config.task_rabbitmq.to_string(),
        "omotes@localhost:5672/omotes"
    );
    assert_eq!(config.task_rabbitmq.password.reveal(), "guest");
    assert_eq!(config.task_result_queue, "omotes_task_result_events");
    assert_eq!(config.task_progress_queue, "omotes_task_progress_events");
    assert_eq!(config.postgres.to_string(), "localhost:5432/public");
    assert_eq!(config.postgres.username, None);
    assert_eq!(config.delivery_limit, 1);
    assert_eq!(config.http_bind, Some("127.0.0.1:8080".parse().unwrap()));
    assert_eq!(config.log_level, LevelFilter::Info);
}

#[test]
fn each_connection_has_its_own_variables() {
    let config = read(&[
        ("TASK_RABBITMQ_HOSTNAME", "rabbit"),
        ("TASK_RABBITMQ_PORT", "5673"),
        ("TASK_RABBITMQ_VIRTUALHOST", "omotes_celery"),
        ("CELERY_RABBITMQ_USERNAME", "celery"),
    ])
    .unwrap();
    assert_eq!(
        config.task_rabbitmq.to_string(),
        "omotes@rabbit:5673/omotes_celery"
    );
    assert_eq!(
        config.celery_rabbitmq.to_string(),
        "celery@localhost:5672/omotes"
    );
}

#[test]
fn an_empty_host_switches_influxdb_off() {
    assert_eq!(read(&[("INFLUXDB_HOST", "")]).unwrap().influxdb, None);
    let config = read(&[("TIME_SERIES_PROTECTED_DATABASES", "a, b,")]).unwrap();
    assert_eq!(config.influxdb.unwrap().protected, ["a", "b"]);
}

#[test]
fn an_empty_bind_switches_http_off() {
    assert_eq!(read(&[("HTTP_BIND", "")]).unwrap().http_bind, None);
}

#[rstest]
#[case("debug", LevelFilter::Debug)]
#[case("Info", LevelFilter::Info)]
#[case("WARNING", LevelFilter::Warn)]
#[case("error", LevelFilter::Error)]
#[case("CRITICAL", LevelFilter::Error)]
fn levels_have_pythons_names(#[case] name: &str, #[case] level: LevelFilter) {
    assert_eq!(read(&[("LOG_LEVEL", name)]).unwrap().log_level, level);
}

#[test]
fn all_faults_are_reported_at_once() {
    let faults = read(&[
        ("SDK_RABBITMQ_PORT", "fivesixseventwo"),
        ("POSTGRESQL_PORT", "0"),
        ("DELIVERY_LIMIT_THRESHOLD_PER_JOB", "-1"),
        ("JOB_RETENTION_SEC", "2 days"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "0"),
        ("TIMEOUT_RESULT_TYPE", "ERROR"),
        ("HTTP_BIND", "8080"),
        ("LOG_LEVEL", "LOUD"),
        ("TASK_RESULT_QUEUE_NAME", ""),
    ])
    .unwrap_err();
    assert_eq!(
        faults.to_string(),
        "SDK_RABBITMQ_PORT: found \"fivesixseventwo\", expected a port from 1 to 65535\n\
         TASK_RESULT_QUEUE_NAME: found \"\", expected the name of a queue, 1 to 255 bytes\n\
         POSTGRESQL_PORT: found \"0\", expected a port from 1 to 65535\n\
         JOB_RETENTION_SEC: found \"2 days\", expected a whole number of seconds, up to 32 bits\n\
         TIMEOUT_JOB_HANDLER_RERUN_SEC: found \"0\", expected a whole number of seconds from 1, up to 32 bits\n\
         TIMEOUT_RESULT_TYPE: found \"ERROR\", expected CANCELLED or TIMEOUT\n\
         DELIVERY_LIMIT_THRESHOLD_PER_JOB: found \"-1\", expected a whole number from 1 to 1000000\n\
         HTTP_BIND: found \"8080\", expected an address and port such as 127.0.0.1:8080, or nothing\n\
         LOG_LEVEL: found \"LOUD\", expected DEBUG, INFO, WARNING, ERROR or CRITICAL"
    );
}

/// Wherever somebody may put a password, rightly or not, with whatever is in it.
#[rstest]
fn a_password_is_not_shown(
    #[values(
        "hunter2",
        "hunter2\n",
        " hunter2",
        "/hunter2",
        "hunter2/x",
        "./hunter2",
        "hunter2@x:y",
        "hunter2'\"\\",
        "hunter2\u{202e}",
        "hunter2=#$",
        "\u{1b}hunter2"
    )]
    password: &str,
    #[values(
        "SDK_RABBITMQ_PASSWORD",
        "POSTGRESQL_PASSWORD",
        "INFLUXDB_PASSWORD",
        "TASK_RABBITMQ_PASSWORD_FILE",
        "POSTGRESQL_PASSWORD_FILE",
        "HTTP_BASIC_AUTH",
        "HTTP_READONLY_AUTH",
        "HTTP_BASIC_AUTH_FILE"
    )]
    name: &str,
) {
    // With a fault somewhere else, or without.
    for more in [
        &[][..],
        &[("LOG_LEVEL", "LOUD"), ("POSTGRESQL_PASSWORD", "other")],
    ] {
        let variables = [more, &[(name, password)]].concat();
        let lookup = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        for shown in [
            format!("{:?}", Config::read(&lookup)),
            format!("{:?}", Config::settings(&lookup)),
            Config::read(&lookup)
                .err()
                .map_or(String::new(), |faults| faults.to_string()),
        ] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }
}

#[rstest]
#[case("SDK_RABBITMQ_HOSTNAME", "amqp://omotes:hunter2@rabbitmq:5672/omotes")]
#[case("CELERY_RABBITMQ_HOSTNAME", "omotes:hunter2@rabbitmq")]
#[case("POSTGRESQL_HOST", "postgresql://omotes:hunter2@postgres/jobs")]
#[case("INFLUXDB_HOST", "http://omotes:hunter2@influxdb")]
#[case("POSTGRESQL_PORT", "5432 omotes:hunter2@postgres")]
#[case("HTTP_BIND", "http://omotes:hunter2@0.0.0.0:8080")]
#[case("LOG_LEVEL", "omotes:hunter2@")]
#[case(
    "POSTGRESQL_SSLKEY",
    "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----"
)]
#[case("SDK_RABBITMQ_TLS_KEY_FILE", "-----BEGIN PRIVATE KEY-----\nhunter2")]
fn a_password_in_another_variable_is_told_and_not_shown(#[case] name: &str, #[case] value: &str) {
    let variables = [(name, value), ("SDK_RABBITMQ_TLS", "true")];
    let fault = read(&variables).unwrap_err().to_string();
    assert!(fault.contains(&format!("{name}: expected ")), "{fault}");
    let lookup = |asked: &str| (asked == name).then(|| value.to_owned());
    for shown in [fault, format!("{:?}", Config::settings(&lookup))] {
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

#[rstest]
#[case::fewer_looks_than_a_task_needs("TASK_LOST_SEC", "59")]
#[case::no_time_for_answers("WORKERS_PERIOD_SEC", "4")]
#[case::seldom("WORKERS_PERIOD_SEC", "61")]
#[case::no_number("TASK_LOST_SEC", "never")]
fn what_would_take_tasks_for_lost_is_refused(#[case] name: &str, #[case] value: &str) {
    let fault = read(&[(name, value)]).unwrap_err().to_string();
    assert!(
        fault.contains(&format!("{name}: found {value:?}")),
        "{fault}"
    );
    let off = read(&[("TASK_LOST_SEC", "0"), ("WORKERS_PERIOD_SEC", "0")]).unwrap();
    assert_eq!((off.task_lost, off.workers_period), (None, None));
}

#[test]
fn what_kubernetes_sets_for_a_service_is_told_as_that() {
    let variables = [
        ("POSTGRESQL_PORT", "tcp://10.96.0.7:5432"),
        ("INFLUXDB_PORT", "8086x"),
    ];
    let faults = read(&variables).unwrap_err().to_string();
    let (postgres, influxdb) = faults.split_once('\n').unwrap();
    assert!(
        postgres.starts_with("POSTGRESQL_PORT: found \"tcp://10.96.0.7:5432\""),
        "{faults}"
    );
    assert!(postgres.contains("Kubernetes") && postgres.contains("enableServiceLinks: false"));
    assert!(!influxdb.contains("Kubernetes"), "{faults}");
}

/// A folder with a password, an authority, and a certificate with its key; gone when dropped.
struct Files(PathBuf);

impl Files {
    fn new() -> Files {
        let folder = std::env::temp_dir().join(format!("config-{}", Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        let authority = Authority::new();
        let issued = authority.issue("client");
        write(&folder, "password", "hunter2\n");
        write(&folder, "ca.pem", &authority.pem());
        write(&folder, "client.pem", &issued.certificate);
        write(&folder, "client.key", &issued.key);
        Files(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn roots(&self) -> Roots {
        Roots::File(self.0.join("ca.pem"))
    }

    /// Reads variables, of which `@name` stands for the file of that name.
    fn read(&self, variables: &[(&str, &str)]) -> Result<Config, String> {
        let resolved: Vec<_> = variables
            .iter()
            .map(|(name, value)| match value.strip_prefix('@') {
                Some(file) => (*name, self.path(file)),
                None => (*name, (*value).to_owned()),
            })
            .collect();
        let variables: Vec<_> = resolved
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        // The folder has another name each time.
        read(&variables).map_err(|faults| faults.to_string().replace(&self.path(""), "@"))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[rstest]
#[case("hunter2", "hunter2")]
#[case("hunter2\n", "hunter2")]
#[case("hunter2\r\n", "hunter2")]
#[case("hunter2\n\n", "hunter2\n")]
#[case(" hunter2 \n", " hunter2 ")]
#[case("", "")]
fn a_password_may_be_in_a_file(#[case] content: &str, #[case] password: &str) {
    let files = Files::new();
    write(&files.0, "password", content);
    write(&files.0, "account", "ben:look\n");
    let config = files
        .read(&[
            ("SDK_RABBITMQ_PASSWORD_FILE", "@password"),
            ("POSTGRESQL_PASSWORD_FILE", "@password"),
            ("INFLUXDB_PASSWORD_FILE", "@password"),
            ("HTTP_READONLY_AUTH_FILE", "@account"),
            // As the template has it.
            ("HTTP_READONLY_AUTH", ""),
            // As when it is not set.
            ("TASK_RABBITMQ_PASSWORD_FILE", ""),
            ("TASK_RABBITMQ_PASSWORD", "hunter3"),
        ])
        .unwrap();
    assert_eq!(config.sdk_rabbitmq.password.reveal(), password);
    assert_eq!(config.task_rabbitmq.password.reveal(), "hunter3");
    assert_eq!(config.celery_rabbitmq.password.reveal(), "guest");
    assert_eq!(config.postgres.password.unwrap().reveal(), password);
    let influxdb = config.influxdb.unwrap();
    assert_eq!(influxdb.password.unwrap().reveal(), password);
    assert_eq!(config.http_basic_auth, None);
    assert_eq!(config.http_readonly_auth.unwrap().reveal(), "ben:look");
}

/// An account that is meant to be there must not be missed because its file is empty.
#[rstest]
fn an_empty_file_is_no_account(
    #[values("HTTP_BASIC_AUTH", "HTTP_READONLY_AUTH")] name: &str,
    #[values("", "\n", "\r\n")] content: &str,
) {
    let files = Files::new();
    write(&files.0, "account", content);
    let file_name = format!("{name}_FILE");
    let faults = files.read(&[(&file_name, "@account")]).unwrap_err();
    assert_eq!(
        faults.to_string(),
        format!("{name}: expected user:password")
    );
}

#[rstest]
#[case(
    "HTTP_BASIC_AUTH",
    "hunter2",
    "HTTP_BASIC_AUTH: expected user:password"
)]
#[case(
    "HTTP_READONLY_AUTH",
    ":hunter2",
    "HTTP_READONLY_AUTH: expected user:password"
)]
#[case(
    "HTTP_READONLY_AUTH",
    "ben:",
    "HTTP_READONLY_AUTH: expected user:password"
)]
#[case(
    "HTTP_READONLY_AUTH",
    "anna:look",
    "HTTP_READONLY_AUTH: expected another user than that of HTTP_BASIC_AUTH"
)]
fn an_account_has_a_user_of_its_own(#[case] name: &str, #[case] value: &str, #[case] fault: &str) {
    let faults = read(&[(name, value), ("HTTP_BASIC_AUTH", "anna:s3cret")]).unwrap_err();
    assert_eq!(faults.to_string(), fault);
}

#[rstest]
#[case::both(
    &[("SDK_RABBITMQ_PASSWORD_FILE", "@password"), ("SDK_RABBITMQ_PASSWORD", "hunter3")],
    "SDK_RABBITMQ_PASSWORD_FILE: found @password, but SDK_RABBITMQ_PASSWORD is set too"
)]
#[case::no_file(
    &[("POSTGRESQL_PASSWORD_FILE", "@absent")],
    "POSTGRESQL_PASSWORD_FILE: @absent: No such file or directory (os error 2)"
)]
#[case::a_folder(
    &[("INFLUXDB_PASSWORD_FILE", "@")],
    "INFLUXDB_PASSWORD_FILE: @: Is a directory (os error 21)"
)]
#[case::no_authority(
    &[("SDK_RABBITMQ_TLS", "true"), ("SDK_RABBITMQ_TLS_CA_FILE", "@absent")],
    "SDK_RABBITMQ_TLS_CA_FILE: @absent: No such file or directory (os error 2)"
)]
#[case::a_key_for_an_authority(
    &[("TASK_RABBITMQ_TLS", "true"), ("TASK_RABBITMQ_TLS_CA_FILE", "@client.key")],
    "TASK_RABBITMQ_TLS_CA_FILE: @client.key: no certificate in PEM"
)]
#[case::a_certificate_without_key(
    &[("CELERY_RABBITMQ_TLS", "true"), ("CELERY_RABBITMQ_TLS_CERT_FILE", "@client.pem")],
    "CELERY_RABBITMQ_TLS_KEY_FILE: not set, although CELERY_RABBITMQ_TLS_CERT_FILE is"
)]
#[case::a_key_without_certificate(
    &[("POSTGRESQL_SSLKEY", "@client.key")],
    "POSTGRESQL_SSLCERT: not set, although POSTGRESQL_SSLKEY is"
)]
#[case::another_certificates_key(
    &[("POSTGRESQL_SSLCERT", "@ca.pem"), ("POSTGRESQL_SSLKEY", "@client.key")],
    "POSTGRESQL_SSLCERT, POSTGRESQL_SSLKEY: @client.key as the key of @ca.pem: keys may not be \
     consistent: KeyMismatch"
)]
#[case::files_without_tls(
    &[("SDK_RABBITMQ_TLS_CA_FILE", "@ca.pem")],
    "SDK_RABBITMQ_TLS_CA_FILE: set, although SDK_RABBITMQ_TLS is not true"
)]
#[case::no_switch(
    &[("SDK_RABBITMQ_TLS", "yes")],
    "SDK_RABBITMQ_TLS: found \"yes\", expected true or false"
)]
#[case::no_mode(
    &[("POSTGRESQL_POOLER", "session")],
    "POSTGRESQL_POOLER: found \"session\", expected none or transaction"
)]
#[case(
    &[("POSTGRESQL_SSLMODE", "on")],
    "POSTGRESQL_SSLMODE: found \"on\", expected disable, allow, prefer, require, verify-ca or \
     verify-full"
)]
#[case::nothing_to_verify_with(
    &[("POSTGRESQL_SSLMODE", "verify-ca")],
    "POSTGRESQL_SSLROOTCERT: not set, expected a PEM file, or system, as POSTGRESQL_SSLMODE is \
     one that verifies"
)]
#[case::a_weak_mode_for_public_authorities(
    &[("POSTGRESQL_SSLMODE", "verify-ca"), ("POSTGRESQL_SSLROOTCERT", "system")],
    "POSTGRESQL_SSLMODE: expected verify-full, as POSTGRESQL_SSLROOTCERT is system"
)]
fn a_faulty_file_is_named(#[case] variables: &[(&str, &str)], #[case] fault: &str) {
    assert_eq!(Files::new().read(variables).unwrap_err(), fault);
}

#[test]
fn each_vhost_has_its_own_tls() {
    let files = Files::new();
    let config = files
        .read(&[
            ("SDK_RABBITMQ_TLS", "true"),
            ("TASK_RABBITMQ_TLS", "True"),
            ("TASK_RABBITMQ_PORT", "5699"),
            ("TASK_RABBITMQ_TLS_CA_FILE", "@ca.pem"),
            ("TASK_RABBITMQ_TLS_CERT_FILE", "@client.pem"),
            ("TASK_RABBITMQ_TLS_KEY_FILE", "@client.key"),
            ("CELERY_RABBITMQ_TLS_CA_FILE", ""),
        ])
        .unwrap();
    let sdk = config.sdk_rabbitmq;
    assert_eq!(sdk.to_string(), "omotes@localhost:5671/omotes");
    assert_eq!(
        sdk.tls,
        Some(Tls {
            check: Check::Name(Roots::System),
            identity: None
        })
    );
    let task = config.task_rabbitmq;
    assert_eq!(task.to_string(), "omotes@localhost:5699/omotes");
    assert_eq!(
        task.tls,
        Some(Tls {
            check: Check::Name(files.roots()),
            identity: Some(Identity {
                certificate: files.path("client.pem").into(),
                key: files.path("client.key").into(),
            })
        })
    );
    let celery = config.celery_rabbitmq;
    assert_eq!(celery.to_string(), "omotes@localhost:5672/omotes");
    assert_eq!(celery.tls, None);
}

#[derive(Debug, Clone, Copy)]
enum Sure {
    Nothing,
    Authority,
    Name,
}

#[rstest]
#[case(None, None, Some(Encryption::WhereOffered as fn(Tls) -> Encryption), Sure::Nothing)]
#[case(Some("disable"), None, None, Sure::Nothing)]
#[case(Some("allow"), None, Some(Encryption::WhereRequired as _), Sure::Nothing)]
#[case(Some("prefer"), None, Some(Encryption::WhereOffered as _), Sure::Nothing)]
#[case(Some("require"), None, Some(Encryption::Always as _), Sure::Nothing)]
#[case(None, Some("@ca.pem"), Some(Encryption::WhereOffered as _), Sure::Authority)]
#[case(Some("disable"), Some("@ca.pem"), None, Sure::Nothing)]
#[case(Some("allow"), Some("@ca.pem"), Some(Encryption::WhereRequired as _), Sure::Authority)]
#[case(Some("require"), Some("@ca.pem"), Some(Encryption::Always as _), Sure::Authority)]
#[case(Some("verify-ca"), Some("@ca.pem"), Some(Encryption::Always as _), Sure::Authority)]
#[case(Some("verify-full"), Some("@ca.pem"), Some(Encryption::Always as _), Sure::Name)]
#[case(Some("verify-full"), Some("system"), Some(Encryption::Always as _), Sure::Name)]
#[case(None, Some("system"), Some(Encryption::Always as _), Sure::Name)]
fn sslmode_has_libpqs_meanings(
    #[case] mode: Option<&str>,
    #[case] authorities: Option<&str>,
    #[case] encryption: Option<fn(Tls) -> Encryption>,
    #[case] sure: Sure,
) {
    let files = Files::new();
    let mode = mode.map(|mode| ("POSTGRESQL_SSLMODE", mode));
    let roots = authorities.map(|file| ("POSTGRESQL_SSLROOTCERT", file));
    let variables: Vec<_> = mode.into_iter().chain(roots).collect();
    let config = files.read(&variables).unwrap();
    let roots = match authorities {
        Some("system") => Roots::System,
        Some(_) | None => files.roots(),
    };
    let tls = Tls {
        check: match sure {
            Sure::Nothing => Check::Nothing,
            Sure::Authority => Check::Authority(roots),
            Sure::Name => Check::Name(roots),
        },
        identity: None,
    };
    let expected = encryption.map_or(Encryption::Never, |encryption| encryption(tls));
    assert_eq!(config.postgres.encryption, expected);
}

#[test]
fn a_socket_in_the_file_system_has_no_tls() {
    let config = read(&[
        ("POSTGRESQL_HOST", "/run/postgresql,db"),
        ("POSTGRESQL_SSLMODE", "require"),
    ]);
    let postgres = config.unwrap().postgres;
    let [socket, other] = postgres.servers.as_slice() else {
        panic!("{postgres}")
    };
    assert_eq!(postgres.encryption_to(socket), &Encryption::Never);
    assert_eq!(postgres.encryption_to(other), &postgres.encryption);
    assert_ne!(postgres.encryption, Encryption::Never);
}

#[rstest]
#[case("a", "omotes@a:5673/omotes")]
#[case("a, b:5674", "omotes@a:5673,b:5674/omotes")]
#[case(
    "::1,[fe80::1],[fe80::2]:1",
    "omotes@::1:5673,fe80::1:5673,fe80::2:1/omotes"
)]
fn rabbitmq_may_be_several_servers(#[case] hosts: &str, #[case] expected: &str) {
    let config = read(&[
        ("SDK_RABBITMQ_HOSTNAME", hosts),
        ("SDK_RABBITMQ_PORT", "5673"),
    ])
    .unwrap();
    assert_eq!(config.sdk_rabbitmq.to_string(), expected);
}

#[rstest]
#[case(
    "a,",
    "found \"a,\", expected a host, or several between commas, none of them empty"
)]
#[case(
    "a:0",
    "found \"a:0\", expected a host, or host:port with a port from 1 to 65535"
)]
#[case(
    "a,b:x",
    "found \"b:x\", expected a host, or host:port with a port from 1 to 65535"
)]
fn servers_of_rabbitmq_that_make_no_sense(#[case] hosts: &str, #[case] fault: &str) {
    let faults = read(&[("TASK_RABBITMQ_HOSTNAME", hosts)]).unwrap_err();
    assert_eq!(
        faults.to_string(),
        format!("TASK_RABBITMQ_HOSTNAME: {fault}")
    );
}

#[rstest]
#[case("a", "5433", "a:5433/public")]
#[case("a,b", "5433", "a:5433,b:5433/public")]
#[case(" a, b ", "5433, 5434", "a:5433,b:5434/public")]
#[case("::1,10.0.0.1", "1,2", "::1:1,10.0.0.1:2/public")]
fn postgres_may_be_several_servers(
    #[case] hosts: &str,
    #[case] ports: &str,
    #[case] expected: &str,
) {
    let config = read(&[("POSTGRESQL_HOST", hosts), ("POSTGRESQL_PORT", ports)]).unwrap();
    assert_eq!(config.postgres.to_string(), expected);
}

#[rstest]
#[case(
    "a,b",
    "1,2,3",
    "POSTGRESQL_PORT: found 3 ports, expected one, or as many as there are hosts in \
     POSTGRESQL_HOST, 2"
)]
#[case(
    "a",
    "1,2",
    "POSTGRESQL_PORT: found 2 ports, expected one, or as many as there are hosts in \
     POSTGRESQL_HOST, 1"
)]
#[case(
    "a,,b",
    "1",
    "POSTGRESQL_HOST: found \"a,,b\", expected a host, or several between commas, none of \
     them empty"
)]
#[case(
    "a,b",
    "1,",
    "POSTGRESQL_PORT: found \"1,\", expected a port from 1 to 65535"
)]
#[case(
    "a,b",
    "1,x",
    "POSTGRESQL_PORT: found \"1,x\", expected a port from 1 to 65535"
)]
fn servers_of_postgres_that_make_no_sense(
    #[case] hosts: &str,
    #[case] ports: &str,
    #[case] fault: &str,
) {
    let faults = read(&[("POSTGRESQL_HOST", hosts), ("POSTGRESQL_PORT", ports)]).unwrap_err();
    assert_eq!(faults.to_string(), fault);
}

#[test]
fn what_is_kept_of_a_submission_has_its_parameters() {
    let kept = read(&[("KEEP_INPUTS_SEC", "60"), ("KEEP_RESULTS_SEC", "7")]).unwrap();
    assert_eq!(kept.keep_inputs, Duration::from_secs(60));
    assert_eq!(kept.keep_results, Duration::from_secs(7));
    let none = read(&[("KEEP_PARAMETERS", "false")]).unwrap();
    assert!(!none.keep_parameters && none.keep_inputs.is_zero());
    let faults = read(&[("KEEP_PARAMETERS", "false"), ("KEEP_INPUTS_SEC", "60")]).unwrap_err();
    let faults = faults.to_string();
    assert!(
        faults.contains("which KEEP_PARAMETERS=false forbids"),
        "{faults}"
    );
}

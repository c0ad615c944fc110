//! What this user may do with the tables, and who owns them: after somebody else has restored a
//! dump, that may be wrong.

use anyhow::bail;
use postgres::GenericClient;

/// The last two record the revisions, and are only read between those.
const TABLES: [&str; 21] = [
    "job",
    "job_starts",
    "job_history",
    "job_story",
    "job_result",
    "job_submission",
    "job_act",
    "job_step",
    "job_input",
    "job_turn",
    "turn_owner",
    "queue_limit",
    "esdl_time_series_info",
    "maintenance_run",
    "broker_session",
    "worker",
    "worker_task",
    "absent_task",
    "worker_look",
    "alembic_version",
    "orchestrator_version",
];

/// Something that this user lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    /// What is lacking, for a sentence that begins with the user.
    pub what: String,
    /// The statements that help, for a superuser in this database.
    pub remedy: String,
}

/// What this user lacks to work with the existing tables.
///
/// # Errors
/// The connection is lost.
pub fn to_work(client: &mut impl GenericClient) -> Result<Vec<Lack>, postgres::Error> {
    let rows = client.query(
        "SELECT name, privilege, pg_get_userbyid(relowner) AS owner,
                format('GRANT %s ON %s TO %I;', privilege, pg_class.oid::regclass, current_user)
         FROM unnest($1::text[]) WITH ORDINALITY AS wanted (name, place)
         JOIN pg_class ON pg_class.oid = to_regclass(name),
              unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) WITH ORDINALITY
                  AS privileges (privilege, rank)
         WHERE NOT has_table_privilege(pg_class.oid, privilege)
           AND (privilege = 'SELECT' OR name NOT IN ('alembic_version', 'orchestrator_version'))
         ORDER BY place, rank",
        &[&TABLES.as_slice()],
    )?;
    Ok(rows
        .iter()
        .map(|row| {
            let (table, privilege): (&str, &str) = (row.get(0), row.get(1));
            let owner: &str = row.get("owner");
            Lack {
                what: format!("{privilege} on {table}, which is {owner}'s"),
                remedy: row.get(3),
            }
        })
        .collect())
}

/// What this user lacks to apply revisions: only a table's owner, or a member of that role, may
/// alter it.
///
/// # Errors
/// The connection is lost.
pub fn to_upgrade(client: &mut impl GenericClient) -> Result<Vec<Lack>, postgres::Error> {
    let rows = client.query(
        "SELECT name, pg_get_userbyid(relowner) AS owner,
                format('ALTER TABLE %s OWNER TO %I;', pg_class.oid::regclass, current_user)
         FROM unnest($1::text[]) WITH ORDINALITY AS wanted (name, place)
         JOIN pg_class ON pg_class.oid = to_regclass(name)
         WHERE NOT pg_has_role(relowner, 'USAGE')
         ORDER BY place",
        &[&TABLES.as_slice()],
    )?;
    let mut lacks: Vec<_> = rows
        .iter()
        .map(|row| {
            let (table, owner): (&str, &str) = (row.get(0), row.get(1));
            Lack {
                what: format!("the ownership of {table}, which is {owner}'s"),
                remedy: row.get(2),
            }
        })
        .collect();
    let row = client.query_one(
        "SELECT current_schema()::text, current_setting('search_path'),
                coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
                format('GRANT USAGE, CREATE ON SCHEMA %I TO %I;', current_schema(), current_user)",
        &[],
    )?;
    if !row.get::<_, bool>(2) {
        let schema: Option<&str> = row.get(0);
        let path: &str = row.get(1);
        lacks.push(match schema {
            Some(schema) => Lack {
                what: format!("CREATE on the schema {schema}, for revisions of the tables"),
                remedy: row.get(3),
            },
            None => Lack {
                what: format!(
                    "a schema to create tables in: none in the search_path ({path}) exists and lets \
                     it in"
                ),
                remedy: "GRANT USAGE, CREATE ON SCHEMA public TO the user;".to_owned(),
            },
        });
    }
    Ok(lacks)
}

/// Ok if nothing is lacking, else an error with what `user` lacks and the statements that help.
///
/// # Errors
/// Something is lacking.
pub(super) fn ensure_none(user: &str, lacks: &[Lack]) -> anyhow::Result<()> {
    if lacks.is_empty() {
        return Ok(());
    }
    let what: Vec<_> = lacks.iter().map(|lack| lack.what.as_str()).collect();
    bail!(
        "the user {user} lacks {}. As a superuser, in this database: {}",
        what.join("; "),
        statements(lacks)
    );
}

/// The statements that help.
pub fn statements(lacks: &[Lack]) -> String {
    let statements: Vec<_> = lacks.iter().map(|lack| lack.remedy.as_str()).collect();
    statements.join(" ")
}

//! Who may look and who may act, and the seals on what a page hands to a browser to get it back. A
//! seal says the same on every replica: its key comes from an account's password alone.

use std::num::NonZeroU32;

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use ring::{hmac, pbkdf2};

use crate::config::{Config, Secret};

/// A form that is older has to be loaded again.
const FORM_LIFETIME: SignedDuration = SignedDuration::from_hours(4);
/// For how long a page shows what was done.
const NOTE_LIFETIME: SignedDuration = SignedDuration::from_mins(10);
/// For how long a browser that was here is known.
pub(super) const PASS_LIFETIME: SignedDuration = SignedDuration::from_hours(30 * 24);
/// So far may the clocks of replicas differ.
const CLOCKS: SignedDuration = SignedDuration::from_mins(5);
/// Seals of the same minutes are the same, so that a page does not differ each time it is loaded.
const STEP: i64 = 600;
/// Whoever sees a seal, as in a link that somebody has passed on, takes so much longer to guess the
/// passwords by it.
const ITERATIONS: NonZeroU32 = NonZeroU32::new(100_000).unwrap();

/// What a visitor may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    /// Nobody needs an account, and nobody may act.
    Open,
    Look(String),
    Act(String),
}

/// What a seal is for. One is not taken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Form,
    Note,
    /// The id of the job that a form submits, so that one that is sent twice submits one job.
    Job,
    /// A browser that has had the right password goes on with this account while somebody else at its
    /// address, as behind a proxy, guesses. It opens nothing: the password is needed as well, and
    /// nobody can guess another account's by it.
    Pass,
}

/// Why a seal is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SealFault {
    Forged,
    Old,
}

struct Account {
    name: String,
    access: Access,
    /// From its own credentials: what somebody gets who has another account is of no help in guessing
    /// this one's password.
    key: hmac::Key,
    /// The credentials under the key.
    tag: hmac::Tag,
}

impl Account {
    fn new(credentials: &Secret, access: fn(String) -> Access) -> Account {
        let credentials = credentials.reveal();
        let name = credentials.split(':').next().unwrap_or_default().to_owned();
        let mut key = [0; 32];
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA256,
            ITERATIONS,
            b"omotes-orchestrator, HTTP account",
            credentials.as_bytes(),
            &mut key,
        );
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        Account {
            access: access(name.clone()),
            tag: hmac::sign(&key, credentials.as_bytes()),
            name,
            key,
        }
    }
}

/// The accounts of the configuration.
pub(super) struct Accounts(Vec<Account>);

impl Accounts {
    pub(super) fn new(config: &Config) -> Accounts {
        let operator = config.http_basic_auth.as_ref();
        let reader = config.http_readonly_auth.as_ref();
        let operator = operator.map(|one| Account::new(one, Access::Act));
        let reader = reader.map(|one| Account::new(one, Access::Look));
        Accounts(operator.into_iter().chain(reader).collect())
    }

    /// Whether there are any.
    pub(super) fn exist(&self) -> bool {
        !self.0.is_empty()
    }

    /// What a request with this `Authorization` may do; None if it needs another one. Wrong
    /// credentials of the same length take the same time.
    pub(super) fn access(&self, authorization: Option<&str>) -> Option<Access> {
        if !self.exist() {
            return Some(Access::Open);
        }
        let given = credentials(authorization?)?;
        let mut access = None;
        for account in &self.0 {
            // Compares in constant time.
            if hmac::verify(&account.key, &given, account.tag.as_ref()).is_ok() {
                access = Some(account.access.clone());
            }
        }
        access
    }

    /// The name of the account that an `Authorization` is for, if there is that account.
    pub(super) fn named(&self, authorization: &str) -> Option<&str> {
        let name = user(authorization)?;
        let mut all = self.0.iter();
        all.find(|one| one.name == name).map(|one| &*one.name)
    }

    /// What seals this text, which is an account's name but for what was done, and the ids of jobs: only
    /// operators are told of these.
    fn key(&self, purpose: Purpose, text: &str) -> Option<&hmac::Key> {
        let is_its = |account: &&Account| match purpose {
            Purpose::Form | Purpose::Pass => account.name == text,
            Purpose::Note | Purpose::Job => matches!(account.access, Access::Act(_)),
        };
        self.0.iter().find(is_its).map(|account| &account.key)
    }

    /// A seal on this text, for this purpose, of this time; empty, and none, without an account for
    /// it.
    pub(super) fn seal(&self, purpose: Purpose, text: &str, now: Timestamp) -> String {
        let since = now.as_second().div_euclid(STEP) * STEP;
        let Some(key) = self.key(purpose, text) else {
            return String::new();
        };
        let tag = hmac::sign(key, &sealed(purpose, text, since));
        format!("{since}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag))
    }

    /// # Errors
    /// It is none of this text, or too old.
    pub(super) fn check_seal(
        &self,
        purpose: Purpose,
        text: &str,
        seal: &str,
        now: Timestamp,
    ) -> Result<(), SealFault> {
        let key = self.key(purpose, text).ok_or(SealFault::Forged)?;
        let (since, tag) = seal.split_once('.').ok_or(SealFault::Forged)?;
        let since: i64 = since.parse().map_err(|_| SealFault::Forged)?;
        let tag = BASE64_URL_SAFE_NO_PAD.decode(tag);
        let tag = tag.map_err(|_| SealFault::Forged)?;
        // Compares in constant time.
        hmac::verify(key, &sealed(purpose, text, since), &tag).map_err(|_| SealFault::Forged)?;
        let age = SignedDuration::from_secs(now.as_second().saturating_sub(since));
        let lifetime = match purpose {
            Purpose::Form | Purpose::Job => FORM_LIFETIME,
            Purpose::Note => NOTE_LIFETIME,
            Purpose::Pass => PASS_LIFETIME,
        };
        match age > lifetime + SignedDuration::from_secs(STEP) || age < -CLOCKS {
            true => Err(SealFault::Old),
            false => Ok(()),
        }
    }
}

/// `user:password` of an `Authorization`.
fn credentials(authorization: &str) -> Option<Vec<u8>> {
    let (scheme, encoded) = authorization.split_once(' ')?;
    let is_basic = scheme.eq_ignore_ascii_case("basic");
    let decoded = BASE64_STANDARD.decode(encoded.trim()).ok();
    decoded.filter(|_| is_basic)
}

/// Whose account an `Authorization` is for.
pub(super) fn user(authorization: &str) -> Option<String> {
    let given = String::from_utf8(credentials(authorization)?).ok()?;
    given.split(':').next().map(str::to_owned)
}

/// The bytes that a seal is on.
fn sealed(purpose: Purpose, text: &str, since: i64) -> Vec<u8> {
    let purpose = match purpose {
        Purpose::Form => "form",
        Purpose::Note => "note",
        Purpose::Job => "job",
        Purpose::Pass => "pass",
    };
    format!("{purpose}\0{since}\0{text}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn accounts(operator: Option<&str>, reader: Option<&str>) -> Accounts {
        let lookup = |name: &str| {
            let account = match name {
                "HTTP_BASIC_AUTH" => operator,
                "HTTP_READONLY_AUTH" => reader,
                _ => None,
            };
            account.map(str::to_owned)
        };
        Accounts::new(&Config::read(&lookup).unwrap())
    }

    fn basic(credentials: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(credentials))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[rstest]
    #[case(basic("anna:s3cret"), Some(Access::Act("anna".to_owned())))]
    #[case(basic("ben:look:here"), Some(Access::Look("ben".to_owned())))]
    #[case(basic("anna:s3cret").replace("Basic", "bAsIc"), Some(Access::Act("anna".to_owned())))]
    #[case(basic("anna:s3creT"), None)]
    #[case(basic("anna:s3cret2"), None)]
    #[case(basic("anna:s3cre"), None)]
    #[case(basic("anna:look:here"), None)]
    #[case(basic("ben:look"), None)]
    #[case(basic("anna:"), None)]
    #[case(basic("\0"), None)]
    #[case(basic(""), None)]
    #[case("Bearer anna:s3cret".to_owned(), None)]
    #[case("Basic =".to_owned(), None)]
    #[case("Basic".to_owned(), None)]
    #[case(String::new(), None)]
    fn an_account_is_known_by_its_password(#[case] header: String, #[case] access: Option<Access>) {
        let accounts = accounts(Some("anna:s3cret"), Some("ben:look:here"));
        assert_eq!(accounts.access(Some(&header)), access);
        assert_eq!(accounts.access(None), None);
    }

    #[test]
    fn without_accounts_everybody_looks_and_nobody_acts() {
        let open = accounts(None, None);
        assert!(!open.exist());
        assert_eq!(open.access(Some(&basic("anna:s3cret"))), Some(Access::Open));
        let reader = accounts(None, Some("ben:look"));
        assert_eq!(reader.access(None), None);
        let found = reader.access(Some(&basic("ben:look")));
        assert_eq!(found, Some(Access::Look("ben".to_owned())));
    }

    #[rstest]
    #[case::at_once(0, Ok(()))]
    #[case::later(4 * 3600, Ok(()))]
    #[case::too_late(4 * 3600 + 1201, Err(SealFault::Old))]
    #[case::by_a_clock_that_is_behind(-200, Ok(()))]
    #[case::from_the_future(-3600, Err(SealFault::Old))]
    fn a_seal_holds_for_a_time_and_on_every_replica(
        #[case] later: i64,
        #[case] expected: Result<(), SealFault>,
    ) {
        let now = 1_800_000_000;
        let seal = accounts(Some("anna:s3cret"), None).seal(Purpose::Form, "anna", at(now));
        let other = accounts(Some("anna:s3cret"), None);
        let found = other.check_seal(Purpose::Form, "anna", &seal, at(now + later));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_seal_is_of_one_text_purpose_time_and_password() {
        let now = at(1_800_000_000);
        let accounts_of = |password: &str| accounts(Some(&format!("anna:{password}")), None);
        let one = accounts_of("s3cret");
        let seal = one.seal(Purpose::Form, "anna", now);
        let check = |accounts: &Accounts, purpose, text, seal: &str| {
            accounts.check_seal(purpose, text, seal, now)
        };
        assert_eq!(check(&one, Purpose::Form, "anna", &seal), Ok(()));
        let forged = Err(SealFault::Forged);
        assert_eq!(check(&one, Purpose::Note, "anna", &seal), forged);
        assert_eq!(check(&one, Purpose::Form, "ben", &seal), forged);
        assert_eq!(
            check(&accounts_of("other"), Purpose::Form, "anna", &seal),
            forged
        );
        let (_, tag) = seal.split_once('.').unwrap();
        for forgery in [
            "",
            ".",
            "1800000000",
            "1800000000.",
            "x.y",
            &format!("1800000600.{tag}"),
            &format!("9223372036854775807.{tag}"),
            &seal[..seal.len() - 1],
            &format!("{seal}A"),
        ] {
            assert_eq!(
                check(&one, Purpose::Form, "anna", forgery),
                forged,
                "{forgery}"
            );
        }
    }

    #[test]
    fn without_accounts_nothing_is_sealed() {
        let now = at(1_800_000_000);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[0; 32]);
        let open = accounts(None, None);
        let since = 1_800_000_000;
        for purpose in [Purpose::Form, Purpose::Note, Purpose::Pass] {
            let tag = hmac::sign(&key, &sealed(purpose, "all is well", since));
            let forgery = format!("{since}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag));
            let own = open.seal(purpose, "all is well", now);
            for seal in [forgery, own] {
                let found = open.check_seal(purpose, "all is well", &seal, now);
                assert_eq!(found, Err(SealFault::Forged), "{purpose:?}");
            }
        }
    }

    /// Whoever has one account's password learns nothing of the other's by the seals that it gets.
    #[test]
    fn an_accounts_seals_come_from_its_own_password_alone() {
        let now = at(1_800_000_000);
        let one = accounts(Some("anna:s3cret"), Some("ben:look"));
        let another_operator = accounts(Some("anna:other"), Some("ben:look"));
        let another_reader = accounts(Some("anna:s3cret"), Some("ben:other"));
        let seal = |accounts: &Accounts, purpose, text| accounts.seal(purpose, text, now);
        let of_ben = seal(&one, Purpose::Pass, "ben");
        assert_eq!(of_ben, seal(&another_operator, Purpose::Pass, "ben"));
        assert_ne!(of_ben, seal(&another_reader, Purpose::Pass, "ben"));
        for (purpose, text) in [
            (Purpose::Pass, "anna"),
            (Purpose::Form, "anna"),
            (Purpose::Note, "done"),
            (Purpose::Job, "id"),
        ] {
            let of_anna = seal(&one, purpose, text);
            assert_eq!(of_anna, seal(&another_reader, purpose, text));
            assert_ne!(of_anna, seal(&another_operator, purpose, text));
        }
    }
}

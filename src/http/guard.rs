//! What keeps others from acting in a visitor's name: guesses are slow, and a form counts only where
//! this service has shown it.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// For how long the answer to wrong credentials is held.
pub(super) const PENALTY: Duration = Duration::from_secs(2);
/// So many answers are held for one peer; until then nothing more that it gives is looked at.
const MAX_HELD: usize = 5;
/// Beyond that the peer whose last guess is the oldest is forgotten.
const MAX_PEERS: usize = 1024;

/// The peers that have given wrong credentials, for which account, and until when their answers are
/// held. They count even when the peer has hung up since. So many share an address that one who
/// guesses must not shut out those with other accounts. Names without an account count as one: else
/// whoever makes up enough of them has its guesses forgotten.
#[derive(Debug, Default)]
pub(super) struct Guesses(BTreeMap<Guesser, VecDeque<Instant>>);

/// Where somebody guesses from, and at which account's password.
type Guesser = (IpAddr, Option<String>);

impl Guesses {
    /// Whether credentials of this peer for this account are looked at.
    pub(super) fn may_guess(&mut self, peer: IpAddr, account: Option<&str>, now: Instant) -> bool {
        let Some(held) = self.0.get_mut(&guesser(peer, account)) else {
            return true;
        };
        while held.front().is_some_and(|until| *until <= now) {
            held.pop_front();
        }
        held.len() < MAX_HELD
    }

    /// Counts wrong credentials. Returns whether they were the last ones to be looked at for now.
    pub(super) fn wrong(&mut self, peer: IpAddr, account: Option<&str>, now: Instant) -> bool {
        self.0
            .retain(|_, held| held.back().is_some_and(|until| *until > now));
        let guesser = guesser(peer, account);
        if self.0.len() >= MAX_PEERS && !self.0.contains_key(&guesser) {
            let oldest = self.0.iter().min_by_key(|(_, held)| held.back().copied());
            if let Some(oldest) = oldest.map(|(guesser, _)| guesser.clone()) {
                self.0.remove(&oldest);
            }
        }
        let held = self.0.entry(guesser).or_default();
        held.push_back(now + PENALTY);
        // Of a browser that is known, they may be more.
        let is_last = held.len() == MAX_HELD;
        held.truncate(MAX_HELD);
        is_last
    }
}

fn guesser(peer: IpAddr, account: Option<&str>) -> Guesser {
    (neighbourhood(peer), account.map(str::to_owned))
}

/// A host has as many addresses of IPv6 as it likes, of the same first half.
fn neighbourhood(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let mut segments = address.segments();
            segments[4..].fill(0);
            Ipv6Addr::from(segments).into()
        }
    }
}

/// The headers by which browsers say where a request comes from.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Provenance<'a> {
    pub(super) site: Option<&'a str>,
    pub(super) origin: Option<&'a str>,
    pub(super) host: Option<&'a str>,
    /// The host as the browser knows it, where a proxy changes it. No page makes a browser send it.
    pub(super) forwarded_host: Option<&'a str>,
}

impl Provenance<'_> {
    /// Checks that the request comes from a page of this service, or from no browser at all.
    ///
    /// # Errors
    /// Where it comes from.
    pub(super) fn check(&self) -> Result<(), String> {
        match (self.site, self.origin) {
            (Some("same-origin" | "none"), _) | (None, None) => Ok(()),
            (Some(site), _) => Err(format!("Sec-Fetch-Site is {site}")),
            (None, Some(origin)) => {
                let from = origin.split_once("://").map(|(_, host)| host);
                let own = [self.host, self.forwarded_host];
                let is_own = |host: &str| own.iter().flatten().any(|own| same_host(own, host));
                match from.is_some_and(is_own) {
                    true => Ok(()),
                    false => Err(format!(
                        "Origin is {origin}, and Host {}",
                        self.host.unwrap_or("missing")
                    )),
                }
            }
        }
    }
}

/// A browser leaves a scheme's own port out, and a proxy may not.
fn same_host(own: &str, other: &str) -> bool {
    let bare = |host: &str| {
        let host = host.trim().to_ascii_lowercase();
        let bare = host.strip_suffix(":80").or(host.strip_suffix(":443"));
        bare.map_or(host.clone(), str::to_owned)
    };
    !own.is_empty() && bare(own) == bare(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::curl(None, None, None, true)]
    #[case::a_form_of_ours(Some("same-origin"), Some("http://jobs:8080"), None, true)]
    #[case::reloaded(Some("none"), None, None, true)]
    #[case::behind_a_proxy_that_changes_the_host(
        Some("same-origin"),
        Some("https://a.nl"),
        None,
        true
    )]
    #[case::another_site(Some("cross-site"), Some("http://evil"), None, false)]
    #[case::another_site_that_claims_ours(
        Some("cross-site"),
        Some("http://jobs:8080"),
        None,
        false
    )]
    #[case::a_neighbour(Some("same-site"), Some("http://x.jobs:8080"), None, false)]
    #[case::an_older_browser(None, Some("http://jobs:8080"), None, true)]
    #[case::of_another_case(None, Some("http://JOBS:8080"), None, true)]
    #[case::an_older_browser_elsewhere(None, Some("http://evil"), None, false)]
    #[case::a_name_that_begins_alike(None, Some("http://jobs:8080.evil"), None, false)]
    #[case::a_user_alike(None, Some("http://jobs:8080@evil"), None, false)]
    #[case::another_port(None, Some("http://jobs:81"), None, false)]
    #[case::hidden(None, Some("null"), None, false)]
    #[case::empty(None, Some(""), None, false)]
    #[case::forwarded(None, Some("https://a.nl"), Some("a.nl"), true)]
    #[case::forwarded_with_its_port(None, Some("https://a.nl"), Some("a.nl:443"), true)]
    #[case::forwarded_from_elsewhere(None, Some("https://evil"), Some("a.nl"), false)]
    #[case::forwarded_from_nowhere(None, Some("https://"), Some(""), false)]
    fn only_our_own_pages_forms_count(
        #[case] site: Option<&str>,
        #[case] origin: Option<&str>,
        #[case] forwarded_host: Option<&str>,
        #[case] is_ours: bool,
    ) {
        let provenance = Provenance {
            site,
            origin,
            host: Some("jobs:8080"),
            forwarded_host,
        };
        assert_eq!(provenance.check().is_ok(), is_ours, "{provenance:?}");
    }

    #[test]
    fn guesses_of_one_peer_are_few_and_nobody_else_is_held_up() {
        let mut guesses = Guesses::default();
        let [one, other] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let anna = Some("anna");
        let begin = Instant::now();
        for _ in 0..MAX_HELD {
            assert!(guesses.may_guess(one, anna, begin));
            guesses.wrong(one, anna, begin);
        }
        assert!(!guesses.may_guess(one, anna, begin));
        let same = "::ffff:10.0.0.1".parse().unwrap();
        assert!(!guesses.may_guess(same, anna, begin));
        assert!(guesses.may_guess(other, anna, begin));
        // Those behind the same address who look with another account.
        assert!(guesses.may_guess(one, Some("prometheus"), begin));
        assert!(guesses.may_guess(one, None, begin));
        assert!(guesses.may_guess(one, anna, begin + PENALTY));
    }

    #[test]
    fn a_host_with_many_addresses_is_one_peer_and_the_table_has_an_end() {
        let mut guesses = Guesses::default();
        let anna = Some("anna");
        let begin = Instant::now();
        for number in 0..MAX_HELD {
            let peer = format!("2001:db8::{number}").parse().unwrap();
            guesses.wrong(peer, anna, begin);
        }
        let may_guess = |guesses: &mut Guesses, peer: &str| {
            guesses.may_guess(peer.parse().unwrap(), anna, begin)
        };
        assert!(!may_guess(&mut guesses, "2001:db8::ffff"));
        assert!(may_guess(&mut guesses, "2001:db8:0:1::1"));
        for number in 0..2 * MAX_PEERS {
            let number = u32::try_from(number).unwrap();
            guesses.wrong(std::net::Ipv4Addr::from(number).into(), anna, begin);
        }
        assert_eq!(guesses.0.len(), MAX_PEERS);
        let later = begin + PENALTY;
        guesses.wrong("10.0.0.1".parse().unwrap(), anna, later);
        assert_eq!(guesses.0.len(), 1);
    }
}

//! What the orchestrator reads of an ESDL.

use std::collections::HashMap;

use quick_xml::Reader;
use quick_xml::escape::{resolve_predefined_entity, unescape_with};
use quick_xml::events::{BytesStart, Event};

/// The element that an ESDL is about, whatever its namespace is called.
const ENERGY_SYSTEM: &str = "EnergySystem";
/// How far into a text it is looked for, in bytes.
const MAX_DISTANCE: u64 = 1024 * 1024;
/// The length of an entity that a document defines, in bytes, and how many there may be.
const MAX_ENTITY: usize = 1024;
const MAX_ENTITIES: usize = 100;

/// The `id` of the energy system that `text` describes, which also names the database of its time
/// series. It stands on the first `EnergySystem`, which is the outermost element or, where tools write
/// several things into one file, stands within `xmi:XMI`; nothing behind it is read. Where there is none,
/// the outermost element's counts. None when there is no such id or the text is not XML up to there.
pub fn energy_system_id(text: &str) -> Option<String> {
    let mut reader = Reader::from_str(text);
    let mut entities = Entities::default();
    let mut outermost: Option<Option<String>> = None;
    while reader.buffer_position() < MAX_DISTANCE {
        match reader.read_event() {
            Ok(Event::Start(element) | Event::Empty(element)) => {
                if element.local_name().into_inner() == ENERGY_SYSTEM {
                    return id(&element, &entities);
                }
                if outermost.is_none() {
                    outermost = Some(id(&element, &entities));
                }
            }
            Ok(Event::DocType(definition)) => entities.define(&definition),
            Ok(Event::Eof) | Err(_) => break,
            // Before the outermost element there is none of these.
            Ok(Event::End(_) | Event::CData(_) | Event::GeneralRef(_)) if outermost.is_none() => {
                return None;
            }
            Ok(
                Event::End(_)
                | Event::CData(_)
                | Event::GeneralRef(_)
                | Event::Text(_)
                | Event::Comment(_)
                | Event::Decl(_)
                | Event::PI(_),
            ) => {}
        }
    }
    outermost.flatten()
}

/// Why `text` is no ESDL, if it is none: it has to be XML as a whole, and about an `EnergySystem`.
pub fn fault(text: &str) -> Option<String> {
    if text.trim().is_empty() {
        return Some("it is empty".to_owned());
    }
    let mut reader = Reader::from_str(text);
    let (mut outermost, mut has_system, mut open) = (None::<String>, false, 0_usize);
    loop {
        let event = match reader.read_event() {
            Ok(event) => event,
            Err(error) => return Some(format!("it is no XML: {error}")),
        };
        match event {
            Event::Start(ref element) | Event::Empty(ref element) => {
                let name = element.local_name().into_inner();
                has_system |= name == ENERGY_SYSTEM;
                outermost.get_or_insert_with(|| name.to_owned());
                open += usize::from(matches!(event, Event::Start(_)));
            }
            // One too many is an error of the reader's.
            Event::End(_) => open = open.saturating_sub(1),
            Event::Eof => break,
            Event::CData(_)
            | Event::GeneralRef(_)
            | Event::Text(_)
            | Event::Comment(_)
            | Event::Decl(_)
            | Event::DocType(_)
            | Event::PI(_) => {}
        }
    }
    match (outermost, has_system) {
        (None, _) => Some("it is no XML".to_owned()),
        (Some(_), _) if open > 0 => Some("it ends in the middle: it may be cut off".to_owned()),
        (Some(_), true) => None,
        (Some(name), false) => Some(format!(
            "it has no {ENERGY_SYSTEM}, but is a document {name:?}"
        )),
    }
}

fn id(element: &BytesStart<'_>, entities: &Entities) -> Option<String> {
    let id = element.try_get_attribute("id").ok()??;
    // A line break in an attribute is a space, unless it is a reference to one.
    let raw = id
        .value
        .replace("\r\n", " ")
        .replace(['\t', '\r', '\n'], " ");
    let id = unescape_with(&raw, |name| entities.resolve(name)).ok()?;
    // Postgres has no text with a NUL in it, so no guard row could name this one.
    (!id.is_empty() && !id.contains('\0')).then(|| id.into_owned())
}

/// The entities that a document defines: `<!ENTITY name "text">`.
#[derive(Default)]
struct Entities(HashMap<String, String>);

impl Entities {
    fn resolve(&self, name: &str) -> Option<&str> {
        let own = self.0.get(name).map(String::as_str);
        own.or_else(|| resolve_predefined_entity(name))
    }

    /// Reads the entities of a document type definition that are defined by a text and refer only
    /// to earlier ones. One that is too long is not defined, so however they are nested, none
    /// becomes long.
    fn define(&mut self, definition: &str) {
        for rest in definition.split("<!ENTITY").skip(1).take(MAX_ENTITIES) {
            let Some((name, rest)) = rest.trim_start().split_once(char::is_whitespace) else {
                continue;
            };
            let rest = rest.trim_start();
            let Some(quote) = rest.chars().next().filter(|first| "\"'".contains(*first)) else {
                continue;
            };
            let Some((text, _)) = rest[1..].split_once(quote) else {
                continue;
            };
            if text.len() > MAX_ENTITY || text.contains('<') {
                continue;
            }
            let Ok(text) = unescape_with(text, |name| self.resolve(name)) else {
                continue;
            };
            // Of two with one name, the first counts.
            if text.len() <= MAX_ENTITY && !self.0.contains_key(name) {
                let text = text.into_owned();
                self.0.insert(name.to_owned(), text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{energy_system_id, fault};
    use rstest::rstest;

    #[rstest]
    #[case::plain(r#"<esdl:EnergySystem id="a-1" name="n"/>"#, Some("a-1"))]
    #[case::declaration(
        "<?xml version='1.0'?>\n<!-- c -->\n<e id='x'><e id='y'/></e>",
        Some("x")
    )]
    #[case::bom("\u{feff}<e id='x'/>", Some("x"))]
    #[case::entity("<e id='a&amp;b'/>", Some("a&b"))]
    #[case::first_element_only("<e><e id='y'/></e>", None)]
    #[case::cut_off_later("<e id='x'><asset id=", Some("x"))]
    #[case::cut_off_in_it("<e id='x", None)]
    #[case::empty_id("<e id=''/>", None)]
    #[case::line_breaks("<e id='a\r\nb\tc&#10;d'/>", Some("a b c\nd"))]
    #[case::nul("<e id='a&#0;'/>", None)]
    #[case::namespaced_id_is_another("<e xmi:id='x'/>", None)]
    #[case::character_references("<e id='&#97;-&#x31;'/>", Some("a-1"))]
    #[case::own_entity("<!DOCTYPE e [<!ENTITY a 'b'>]><e id='x&a;'/>", Some("xb"))]
    #[case::own_entities(
        "<!DOCTYPE e [\n<!ENTITY a \"b&#45;\">\n<!ENTITY c '&a;&amp;&a;'> <!ENTITY a 'no'>]>\n<e id='&c;'/>",
        Some("b-&b-")
    )]
    #[case::entity_of_another_file("<!DOCTYPE e [<!ENTITY a SYSTEM 'f'>]><e id='&a;'/>", None)]
    #[case::parameter_entity("<!DOCTYPE e [<!ENTITY % a 'b'>]><e id='&a;'/>", None)]
    #[case::unknown_entity("<e id='&a;'/>", None)]
    #[case::its_own_entity("<!DOCTYPE e [<!ENTITY a '&a;'>]><e id='&a;'/>", None)]
    #[case::xmi(
        "<xmi:XMI xmlns:xmi='x' id='no'>\n <e id='no'>t&amp;<![CDATA[<x/>]]></e>\n <esdl:EnergySystem id='a-1'>",
        Some("a-1")
    )]
    #[case::xmi_empty("<xmi:XMI><EnergySystem id='a-1'/></xmi:XMI>", Some("a-1"))]
    #[case::the_first_of_two(
        "<XMI><a:EnergySystem id='x'/><b:EnergySystem id='y'/></XMI>",
        Some("x")
    )]
    #[case::the_first_without("<XMI><a:EnergySystem/><b:EnergySystem id='y'/></XMI>", None)]
    #[case::outermost_without(
        "<esdl:EnergySystem><EnergySystem id='y'/></esdl:EnergySystem>",
        None
    )]
    #[case::in_a_comment(
        "<XMI><!-- <EnergySystem id='no'/> --><EnergySystem id='x'/></XMI>",
        Some("x")
    )]
    #[case::in_text("<XMI><![CDATA[<EnergySystem id='no'/>]]></XMI>", None)]
    #[case::none_of_that_name("<XMI id='x'><e id='y'/></XMI>", Some("x"))]
    #[case::text_first("text <e id='x'/>", Some("x"))]
    #[case::not_xml("hello", None)]
    #[case::empty("", None)]
    fn the_id_stands_on_the_first_element(#[case] text: &str, #[case] id: Option<&str>) {
        assert_eq!(energy_system_id(text).as_deref(), id);
    }

    #[test]
    fn entities_that_grow_cost_nothing() {
        let mut text = "<!DOCTYPE e [<!ENTITY a0 'aaaaaaaaaa'>".to_owned();
        for level in 1..50 {
            let before = format!("&a{};", level - 1).repeat(10);
            text += &format!("<!ENTITY a{level} '{before}'>");
        }
        let id = |level: u32| energy_system_id(&format!("{text}]><e id='&a{level};'/>"));
        assert_eq!(id(2).map(|id| id.len()), Some(1000));
        assert_eq!(id(3), None);
        assert_eq!(id(49), None);
    }

    #[test]
    fn what_is_far_into_a_text_is_not_looked_for() {
        let text = |distance: usize| {
            let filling = "<e/>".repeat(distance / 4);
            format!("<XMI>{filling}<EnergySystem id='x'/></XMI>")
        };
        assert_eq!(energy_system_id(&text(1_000_000)).as_deref(), Some("x"));
        assert_eq!(energy_system_id(&text(2_000_000)), None);
    }

    #[rstest]
    #[case::esdl(
        "<?xml version='1.0'?>\n<esdl:EnergySystem id='a'><x/></esdl:EnergySystem>",
        ""
    )]
    #[case::empty_system("<EnergySystem/>", "")]
    #[case::among_others("<xmi:XMI><esdl:EnergySystem id='a'/></xmi:XMI>", "")]
    #[case::empty(" \n", "is empty")]
    #[case::text("optimise this", "is no XML")]
    #[case::json("{\"a\": 1}", "is no XML")]
    #[case::another_document(
        "<html><body/></html>",
        "has no EnergySystem, but is a document \"html\""
    )]
    #[case::cut_off("<esdl:EnergySystem id='a'><x>", "ends in the middle")]
    #[case::cut_off_in_a_tag("<esdl:EnergySystem id='a", "is no XML")]
    #[case::crossed("<EnergySystem><x></EnergySystem></x>", "is no XML")]
    fn what_is_no_esdl_is_said_to_be_none(#[case] text: &str, #[case] expected: &str) {
        let said = fault(text).unwrap_or_default();
        assert!(
            said.contains(expected) && said.is_empty() == expected.is_empty(),
            "{said}"
        );
    }
}

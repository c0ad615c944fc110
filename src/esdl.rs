//! The little that the orchestrator reads of an ESDL.

use quick_xml::Reader;
use quick_xml::events::Event;

/// The `id` of the energy system that `text` describes, which also names the database of its time
/// series. It stands on the first element; nothing behind that is read. None when there is no such
/// id or the text is not XML up to there.
pub fn energy_system_id(text: &str) -> Option<String> {
    let mut reader = Reader::from_str(text);
    loop {
        match reader.read_event().ok()? {
            Event::Start(element) | Event::Empty(element) => {
                let id = element.try_get_attribute("id").ok()??;
                let id = id
                    .normalized_value(quick_xml::XmlVersion::Implicit1_0)
                    .ok()?;
                // Postgres has no text with a NUL in it, so no guard row could name this one.
                return (!id.is_empty() && !id.contains('\0')).then(|| id.into_owned());
            }
            Event::Eof => return None,
            Event::End(_) | Event::CData(_) | Event::GeneralRef(_) => return None,
            // Text before the first element is the line break after the declaration.
            Event::Text(_)
            | Event::Comment(_)
            | Event::Decl(_)
            | Event::PI(_)
            | Event::DocType(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::energy_system_id;
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
    #[case::nul("<e id='a&#0;'/>", None)]
    #[case::namespaced_id_is_another("<e xmi:id='x'/>", None)]
    #[case::unknown_entity("<!DOCTYPE e [<!ENTITY a 'b'>]><e id='&a;'/>", None)]
    #[case::not_xml("hello", None)]
    #[case::empty("", None)]
    fn the_id_stands_on_the_first_element(#[case] text: &str, #[case] id: Option<&str>) {
        assert_eq!(energy_system_id(text).as_deref(), id);
    }
}

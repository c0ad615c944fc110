//! Forms with files: `multipart/form-data`, as browsers send it. Pure.

use crate::telemetry::report::one_line;

/// How many fields one may have, and how long the head of one may be.
const MAX_FIELDS: usize = 200;
const MAX_HEAD: usize = 4096;

/// A field, or a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field<'b> {
    pub(super) name: String,
    pub(super) content: &'b [u8],
}

/// The fields of a body with this `Content-Type`, in their order.
///
/// # Errors
/// What is wrong with it.
pub(super) fn fields<'b>(content_type: &str, body: &'b [u8]) -> Result<Vec<Field<'b>>, String> {
    let boundary = boundary(content_type).ok_or("the form's boundary is missing")?;
    let between = format!("\r\n--{boundary}");
    let mut rest = body
        .strip_prefix(&between.as_bytes()[2..])
        .ok_or("the form does not begin with its boundary")?;
    let mut fields = Vec::new();
    loop {
        if rest.starts_with(b"--") {
            return Ok(fields);
        }
        let part = rest
            .strip_prefix(b"\r\n")
            .ok_or("a boundary is followed by something else")?;
        let end = find(part, between.as_bytes()).ok_or("the form ends in the middle")?;
        if fields.len() >= MAX_FIELDS {
            return Err(format!("at most {MAX_FIELDS} fields are read"));
        }
        fields.push(field(&part[..end])?);
        rest = &part[end + between.len()..];
    }
}

/// The parameter of a `Content-Type`.
fn boundary(content_type: &str) -> Option<&str> {
    let mut parameters = content_type.split(';').skip(1).map(str::trim);
    let value = parameters.find_map(|one| {
        let (name, value) = one.split_once('=')?;
        name.eq_ignore_ascii_case("boundary").then_some(value)
    })?;
    let bare = value
        .strip_prefix('"')
        .and_then(|one| one.strip_suffix('"'));
    let boundary = bare.unwrap_or(value);
    (1..=70).contains(&boundary.len()).then_some(boundary)
}

fn field(part: &[u8]) -> Result<Field<'_>, String> {
    const NO_HEAD: &str = "a field has no head";
    let head = &part[..part.len().min(MAX_HEAD)];
    let end = find(head, b"\r\n\r\n").ok_or(NO_HEAD)?;
    let head = String::from_utf8_lossy(&head[..end]);
    let disposition = head.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-disposition")
            .then_some(value)
    });
    let name = disposition.and_then(|value| {
        let (_, rest) = value.split_once("; name=\"")?;
        rest.split('"').next()
    });
    let name = name.ok_or(NO_HEAD)?;
    if name.contains('\0') {
        return Err(format!("{}: no name has a NUL", one_line(name)));
    }
    Ok(Field {
        // What browsers make of a quote and of line breaks.
        name: name
            .replace("%22", "\"")
            .replace("%0D", "\r")
            .replace("%0A", "\n"),
        content: &part[end + 4..],
    })
}

/// Where something begins; in time that grows with the length alone, as long as it begins with a rare byte.
fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(place) = bytes
        .get(from..)?
        .iter()
        .position(|byte| *byte == wanted[0])
    {
        if bytes[from + place..].starts_with(wanted) {
            return Some(from + place);
        }
        from += place + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const TYPE: &str = "multipart/form-data; boundary=xyz";

    #[test]
    fn fields_and_files_are_read() {
        let body = b"--xyz\r\nContent-Disposition: form-data; name=\"a%22b\"\r\n\r\n1\r\n--xyz\r\n\
            content-disposition: form-data; name=\"esdl\"; filename=\"x.esdl\"\r\nContent-Type: text/xml\r\n\r\n\
            <e>\r\n--xy\r\n</e>\r\n--xyz--\r\n";
        let fields = fields("multipart/form-data; Boundary=\"xyz\"", body).unwrap();
        let expected: [(&str, &[u8]); 2] = [("a\"b", b"1"), ("esdl", b"<e>\r\n--xy\r\n</e>")];
        for (field, (name, content)) in fields.iter().zip(expected) {
            assert_eq!((field.name.as_str(), field.content), (name, content));
        }
        assert_eq!(fields.len(), 2);
    }

    #[rstest]
    #[case("multipart/form-data", "", "boundary is missing")]
    #[case("multipart/form-data; boundary=", "", "boundary is missing")]
    #[case(TYPE, "", "does not begin")]
    #[case(TYPE, "--xyz", "followed by something else")]
    #[case(TYPE, "--xyz\r\nContent", "in the middle")]
    #[case(TYPE, "--xyz\r\nContent\r\n--xyz--", "no head")]
    #[case(TYPE, "--xyz\r\nContent: a\r\n\r\nb\r\n--xyz--", "no head")]
    fn a_faulty_form_says_why(#[case] kind: &str, #[case] body: &str, #[case] why: &str) {
        let fault = fields(kind, body.as_bytes()).unwrap_err();
        assert!(fault.contains(why), "{fault}");
    }

    #[test]
    fn there_is_an_end_to_fields() {
        let one = "\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n\r\n--xyz";
        let body = format!("--xyz{}--", one.repeat(MAX_FIELDS + 1));
        let fault = fields(TYPE, body.as_bytes()).unwrap_err();
        assert!(fault.contains("at most 200 fields"), "{fault}");
        let body = format!("--xyz{}--", one.repeat(MAX_FIELDS));
        assert_eq!(fields(TYPE, body.as_bytes()).unwrap().len(), MAX_FIELDS);
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_read_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            kind in "multipart/form-data; boundary=.{0,10}",
        ) {
            let _ = fields(&kind, &bytes);
            let mut text = b"--xyz\r\n".to_vec();
            text.extend(&bytes);
            text.extend(b"\r\n--xyz--");
            let _ = fields(TYPE, &text);
        }
    }
}

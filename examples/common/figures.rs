//! Figures in a README, between two markers, so that nobody has to copy them by hand.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};

/// Replaces what stands between `<!-- figures: begin -->` and `<!-- figures: end -->` in the file at
/// `path` by what `update` makes of it.
///
/// # Errors
/// The file cannot be read or written, or lacks the markers.
pub fn update(path: &Path, update: impl FnOnce(&str) -> String) -> anyhow::Result<()> {
    const BEGIN: &str = "<!-- figures: begin -->\n";
    const END: &str = "<!-- figures: end -->";
    let name = || path.display().to_string();
    let text = fs::read_to_string(path).with_context(name)?;
    let Some((before, rest)) = text.split_once(BEGIN) else {
        bail!("{}: there is no {BEGIN:?}", name());
    };
    let Some((old, after)) = rest.split_once(END) else {
        bail!("{}: there is no {END:?}", name());
    };
    let new = update(old);
    fs::write(path, format!("{before}{BEGIN}{new}{END}{after}")).with_context(name)
}

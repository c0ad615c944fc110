// Fetches this page again and again, and changes only what differs, so that nothing flickers and
// neither selection, scrolling nor what somebody is typing is lost.
"use strict";

const PERIOD = 2000;
const PATIENCE = 15000;

// Forms in which somebody has typed or chosen something. They stay as they are: options have no
// identity, and another one may take the place of the one that was chosen.
const touched = new WeakSet();
document.addEventListener("input", ({ target }) => target.form && touched.add(target.form));

function morph(old, fresh) {
  if (old.isEqualNode(fresh) || touched.has(old)) return;
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || old.id !== fresh.id) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.hasAttribute("data-keep")) return;
  for (const { name } of [...old.attributes]) {
    // What a visitor has opened stays open.
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  // A row keeps its element when others come before it.
  const byId = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let position = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const known = wanted.id && byId.get(wanted.id);
    if (known && known !== position) old.insertBefore(known, position);
    const present = known || position;
    if (!present) {
      old.append(wanted);
    } else if (!known && (present.id || wanted.id)) {
      old.insertBefore(wanted, present);
    } else {
      position = present.nextSibling;
      morph(present, wanted);
    }
  }
  while (position) {
    const next = position.nextSibling;
    position.remove();
    position = next;
  }
}

async function refresh() {
  const stale = document.getElementById("stale");
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    // A page of what does not work is a page too.
    const main = fresh.querySelector("main");
    if (!main) throw new Error(answer.status);
    morph(document.querySelector("main"), main);
    stale.hidden = true;
  } catch (error) {
    stale.hidden = false;
  }
}

async function run() {
  for (;;) {
    await new Promise((resume) => setTimeout(resume, PERIOD));
    if (!document.hidden) await refresh();
  }
}

for (const field of document.querySelectorAll("form[data-keep] select")) {
  field.addEventListener("change", () => field.form.submit());
}
run();

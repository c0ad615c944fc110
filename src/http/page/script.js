// Shows what has changed as it is told, or asks for it now and then where nobody tells, and changes only
// what differs, so that nothing flickers and neither selection, scrolling nor what somebody types is lost.
// Without it the page is a page that is loaded again.
"use strict";

const SLOW = 15000;
const PATIENCE = 15000;
const LOST = 4000;
// A beat comes every ten seconds; a connection that ends without a word says nothing at all.
const SILENT = 25000;

const main = document.getElementById("main");
const stale = document.querySelector("#stale p");
// How far the server's clock is ahead.
let ahead = 0;

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

function two(large, unit, small, smallUnit) {
  return small ? `${large} ${unit} ${small} ${smallUnit}` : `${large} ${unit}`;
}

// As the server says it.
function spoken(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  const [m, h, d] = [60, 3600, 86400].map((unit) => Math.floor(s / unit));
  if (d) return two(d, "d", h % 24, "h");
  if (h) return two(h, "h", m % 60, "min");
  if (m >= 10) return `${m} min`;
  return m ? two(m, "min", s % 60, "s") : `${s} s`;
}

const local = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
const dayAndClock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function count(root) {
  for (const time of root.querySelectorAll("time.since")) {
    write(time, spoken((Date.now() + ahead - Date.parse(time.dateTime)) / 1000));
  }
}

function prepare(root) {
  for (const time of root.querySelectorAll("time.at, time.clock")) {
    const { classList } = time;
    const form = classList.contains("at") ? local : classList.contains("day") ? dayAndClock : clock;
    write(time, form.format(new Date(time.dateTime)));
    time.title = time.dateTime;
  }
  for (const button of root.querySelectorAll("[data-copy]")) button.hidden = false;
  count(root);
}

function show(fresh) {
  prepare(fresh);
  fresh.id = main.id;
  fresh.tabIndex = -1;
  if (main.dataset.live !== undefined && fresh.dataset.live === undefined && fresh.dataset.told) {
    fresh.dataset.live = main.dataset.live;
  }
  delete fresh.dataset.told;
  morph(main, fresh);
}

// When nobody has answered since, if so.
let lost = null;
// When anything was heard, or is expected from.
let heard = Date.now();
// The server's time, and when it has looked at what is shown.
function hear(now, seen) {
  lost = null;
  heard = Date.now();
  stale.hidden = true;
  if (now) ahead = Date.parse(now) - Date.now();
  if (seen) {
    const time = document.querySelector("#as-of time");
    time.dateTime = seen;
    write(time, local.format(new Date(seen)));
  }
}

let source = null;
let timer = null;
// What was told last; what is told next may be how it differs from that.
let known = { edition: null, text: "" };

function told(edition, text) {
  known = { edition, text };
  const fresh = document.createElement("main");
  fresh.innerHTML = text;
  fresh.dataset.told = "1";
  show(fresh);
}

// A text made of pieces of what is known, by their number and how many they are, and of new ones.
function patched(parts) {
  const old = known.text.split("<");
  const texts = parts.map((part) => (typeof part === "string" ? part : old.slice(part[0], part[0] + part[1]).join("<")));
  return texts.join("<");
}

function stop() {
  source?.close();
  source = null;
  clearTimeout(timer);
}

function follow() {
  stop();
  const { live } = main.dataset;
  if (live === undefined || document.hidden) return;
  if (!live) {
    timer = setTimeout(poll, SLOW);
    return;
  }
  heard = Date.now();
  const own = (source = new EventSource(live));
  own.addEventListener("beat", ({ data }) => hear(...data.split(" ")));
  own.addEventListener("page", ({ data, lastEventId }) => {
    hear();
    told(lastEventId, data);
  });
  own.addEventListener("patch", ({ data, lastEventId }) => {
    hear();
    const [edition, parts] = JSON.parse(data);
    // Whoever begins anew is told all of it.
    if (String(edition) !== known.edition) follow();
    else told(lastEventId, patched(parts));
  });
  // Nothing of it changes any more.
  own.addEventListener("end", () => {
    stop();
    delete main.dataset.live;
  });
  own.addEventListener("error", () => {
    if (own !== source) return;
    lost ??= Date.now();
    // There is no place among those who are told: it asks.
    if (own.readyState === EventSource.CLOSED) poll();
  });
}

async function poll() {
  stop();
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    // A page of what does not work is a page too.
    const fresh = page.querySelector("main");
    if (!fresh) throw new Error(answer.status);
    show(fresh);
    const { dateTime } = page.querySelector("#as-of time") ?? {};
    hear(dateTime, dateTime);
  } catch {
    stale.hidden = false;
  }
  clearTimeout(timer);
  timer = setTimeout(follow, SLOW);
}

document.addEventListener("visibilitychange", () => (document.hidden ? stop() : follow()));
addEventListener("pagehide", stop);
addEventListener("pageshow", ({ persisted }) => persisted && follow());
setInterval(() => {
  if (document.hidden) return;
  count(main);
  if (source && Date.now() - heard > SILENT) {
    lost ??= heard;
    follow();
  }
  if (lost !== null && Date.now() - lost > LOST) stale.hidden = false;
}, 1000);

// Without TLS a browser has no clipboard for pages, but it copies what is selected.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

document.addEventListener("click", async ({ target }) => {
  const button = target.closest?.("[data-copy]");
  if (!button) return;
  await copy(button.dataset.copy);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 2000);
});

for (const field of document.querySelectorAll("form[data-keep] select")) {
  field.addEventListener("change", () => field.form.requestSubmit());
}
for (const field of document.querySelectorAll("[data-faulty] :is(input, select)")) {
  field.setAttribute("aria-invalid", "true");
}
document.getElementById("faults")?.focus();
document.addEventListener("keydown", (event) => {
  const search = document.querySelector("input[type=search]");
  if (event.key !== "/" || !search || event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  search.focus();
});

// Back to the list as it was filtered.
if (document.getElementById("jobs")) {
  const query = new URLSearchParams(location.search);
  query.delete("note");
  query.delete("seal");
  sessionStorage.setItem("list", `/?${query}`);
}
for (const back of document.querySelectorAll("nav[aria-label=Back] a[href='/']")) {
  back.href = sessionStorage.getItem("list") ?? "/";
}

{
  const { dateTime } = document.querySelector("#as-of time") ?? {};
  hear(dateTime, dateTime);
}
prepare(document);
follow();

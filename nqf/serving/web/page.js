"use strict";
const K = 12, PAGE = 24;
const at = id => document.getElementById(id);
const state = { history: [], user: "", without: -1, shown: [], base: null, items: new Map(), found: 0, turn: 0 };

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") element.textContent = value;
    else if (name === "click") element.addEventListener("click", value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function say(text) { at("said").textContent = text; }

async function ask(path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const token = sessionStorage.getItem("nqf-token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) at("secret").hidden = false;
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

async function json(path, body) { return (await ask(path, body)).json(); }

async function lookUp(ids) {
  const missing = ids.filter(id => !state.items.has(id));
  if (!missing.length) return;
  for (const item of (await json("v1/lookup", { item_ids: missing })).items) state.items.set(item.item_id, item);
}

function lines(item) {
  const parts = [];
  for (const [name, value] of Object.entries(item.values)) {
    if (Array.isArray(value) && value.every(part => typeof part === "string")) parts.push(value.join(", "));
    else if (typeof value === "number" && Math.abs(value) < 1e7) parts.push(`${name} ${+value.toFixed(2)}`);
  }
  return parts.slice(0, 3).join(" · ");
}

function picture(item) {
  const image = make("img", { class: "picture", alt: "", loading: "lazy", width: 160, height: 120 });
  if (item.picture) {
    const path = `v1/picture?item_id=${encodeURIComponent(item.item_id)}`;
    if (!sessionStorage.getItem("nqf-token")) image.src = path;
    else ask(path).then(answer => answer.blob()).then(blob => { image.src = URL.createObjectURL(blob); }, () => image.remove());
    image.addEventListener("error", () => image.replaceWith(make("span", { class: "picture" })));
    return image;
  }
  return make("span", { class: "picture" });
}

function card(id, ...children) {
  const item = state.items.get(id);
  const head = make("div", {}, make("h3", { text: item.title || id }));
  if (item.new) head.append(make("span", { class: "badge", text: "new", title: "added after training" }));
  if (item.cold) head.append(make("span", { class: "badge", text: "cold", title: "in no training event" }));
  head.append(make("div", { class: "quiet", text: lines(item) || id }));
  return make("li", { "data-id": id }, picture(item), head, ...children);
}

function actions(...buttons) { return make("div", { class: "actions" }, ...buttons); }

async function search(more) {
  const text = at("text").value;
  const answer = await json("v1/search", { text, limit: PAGE, offset: more ? state.found : 0 });
  for (const item of answer.items) state.items.set(item.item_id, item);
  const cards = answer.items.map(item => card(item.item_id, actions(
    make("button", { text: "Add", "aria-label": `Add ${item.title} to the history`, click: () => add(item.item_id) }))));
  if (more) at("found").append(...cards); else at("found").replaceChildren(...cards);
  state.found = (more ? state.found : 0) + cards.length;
  at("count").textContent = `${answer.found.toLocaleString()} items${text ? ` with “${text}”` : ""}`;
  at("more").hidden = state.found >= answer.found;
}

function add(id) { change([...state.history, id], `${state.items.get(id).title || id} is in the history`); }

function change(history, said) {
  Object.assign(state, { history, user: "", without: -1 });
  at("user").value = "";
  return refresh(said);
}

function asked() {
  if (state.user) return { user: state.user };
  return { history: state.history.filter((_, index) => index !== state.without) };
}

// What is shown is compared with the list before; while an item is left out on trial, with that of the whole history.
async function refresh(said) {
  const turn = ++state.turn;
  at("recommended").classList.add("fading");
  const { items } = await json("v1/recommend", { ...asked(), k: K });
  await lookUp([...items.map(item => item.item_id), ...state.history]);
  if (turn !== state.turn) return;
  const before = state.without >= 0 ? state.base : state.shown;
  if (state.without < 0) state.base = items;
  at("history").replaceChildren(...state.history.map(inHistory));
  at("clear").hidden = !state.history.length;
  at("basis").textContent = !items.length ? "Nothing is left to recommend." : items[0].basis === "popular"
    ? "The popular items, as the history is empty."
    : state.user ? `For user ${state.user}.` : `After ${asked().history.length} items.`;
  at("recommended").replaceChildren(...items.map(item => recommended(item, before || [])));
  at("recommended").classList.remove("fading");
  state.shown = items;
  if (said) say(said);
  document.documentElement.dataset.check = "ok";
}

function inHistory(id, index) {
  const title = state.items.get(id).title || id, trial = state.without === index;
  return card(id, actions(
    make("button", { class: "plain", text: "Without", "aria-pressed": trial, "aria-label": `Try without ${title}`,
      click: async () => {
        state.without = trial ? -1 : index;
        await refresh(trial ? "The whole history again" : `What changes without ${title}`);
        at("history").children[index].querySelector("button").focus();
      } }),
    make("button", { class: "plain", text: "Remove", "aria-label": `Remove ${title} from the history`,
      click: async () => {
        await change(state.history.filter((_, other) => other !== index), `${title} was removed`);
        (at("history").querySelector("button") || at("text")).focus();
      } })));
}

function moved(item, before) {
  if (!before.length) return make("span");
  const old = before.find(other => other.item_id === item.item_id);
  if (!old) return make("span", { class: "up", text: " new in the list" });
  const step = old.rank - item.rank;
  return step ? make("span", { class: step > 0 ? "up" : "down", text: ` ${step > 0 ? "▲" : "▼"} ${Math.abs(step)}` }) : make("span");
}

function recommended(item, before) {
  const why = make("div", { class: "why", hidden: "" }), title = item.title || item.item_id;
  const buttons = [make("button", { text: "Add", "aria-label": `Add ${title} to the history`, click: () => add(item.item_id) })];
  if (!state.user && item.basis === "history") {
    buttons.push(make("button", { class: "plain", text: "Why", "aria-expanded": "false", "aria-label": `Why ${title}`,
      click: event => explain(item.item_id, why, event.currentTarget) }));
  }
  const said = item.basis === "popular" ? `${(100 * item.score).toFixed(1)} % of the events` : `score ${item.score.toFixed(3)}`;
  const place = make("div", { class: "quiet", text: `${item.rank}. ${said}` });
  place.append(moved(item, before));
  return card(item.item_id, place, actions(...buttons), why);
}

async function explain(id, why, button) {
  why.hidden = !why.hidden;
  button.setAttribute("aria-expanded", String(!why.hidden));
  if (why.hidden || why.childElementCount) return;
  why.textContent = "…";
  try {
    const answer = await json("v1/explain", { history: asked().history, item_id: id });
    const bars = rows => {
      const most = Math.max(...rows.map(row => Math.abs(row.effect)), 1e-9), list = make("dl");
      for (const row of rows) {
        const bar = make("div", { class: row.effect < 0 ? "bar against" : "bar", title: `${row.effect.toFixed(3)} nats` });
        bar.style.width = `${100 * Math.abs(row.effect) / most}%`;
        list.append(make("dt", { text: row.label }), make("dd", { "aria-label": `${row.effect.toFixed(2)} nats` }, bar));
      }
      return list;
    };
    const strongest = rows => rows.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, 6);
    why.replaceChildren(
      make("strong", { class: "quiet", text: "Items of the history that speak for it" }),
      bars(strongest(answer.history.map(row => ({ ...row, label: row.title || row.item_id })))),
      make("strong", { class: "quiet", text: "Its fields" }),
      bars(strongest(answer.fields.filter(row => row.side === "item").map(row => ({ ...row, label: row.field })))));
  } catch (error) { why.textContent = error.message; }
}

const guarded = call => event => { event?.preventDefault(); Promise.resolve(call(event)).catch(error => say(error.message)); };
addEventListener("unhandledrejection", event => { say(event.reason.message || String(event.reason)); });
addEventListener("error", event => { document.documentElement.dataset.check = event.message; });

async function begin() {
  const health = await json("health");
  at("about").textContent = `${health.items.toLocaleString()} items, ${health.users.toLocaleString()} users, stage ${health.stage}`;
  await search(false);
  await refresh("");
}

at("search").addEventListener("submit", guarded(() => search(false)));
at("more").addEventListener("click", guarded(() => search(true)));
at("clear").addEventListener("click", guarded(() => change([], "The history is empty")));
at("known").addEventListener("submit", guarded(() => {
  Object.assign(state, { history: [], without: -1, user: at("user").value.trim() });
  return refresh(state.user ? `What user ${state.user} is recommended` : "");
}));
at("secret").addEventListener("submit", guarded(() => {
  sessionStorage.setItem("nqf-token", at("token").value);
  at("secret").hidden = true;
  return begin();
}));
addEventListener("keydown", event => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) { event.preventDefault(); at("text").focus(); }
});
guarded(begin)();

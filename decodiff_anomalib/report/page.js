"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const element = (id) => document.getElementById(id);
const root = document.documentElement;

// ---------------------------------------------------------------- light and dark

const THEME = "decodiff-report-theme";
const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (systemIsDark.matches ? "dark" : "light")) === "dark";

function remembered() {
  try {
    return localStorage.getItem(THEME);
  } catch {
    return null; // browsers may keep nothing for files
  }
}

function chooseTheme(theme) {
  root.dataset.theme = theme;
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // chosen for this visit only
  }
  showTheme();
}

function showTheme() {
  element("theme").textContent = isDark() ? "Light" : "Dark";
  element("theme").setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  plots?.recolour();
}

// ---------------------------------------------------------------- data and figures

const PER_PAGE = 20;
const data = read("data");
const thumbnails = read("thumbnails");
const isSeveral = data.categories.length > 1; // then the first is all of them
for (const image of data.images) image.score ??= NaN;

const thresholds = data.categories.map((category) => category.threshold);
const state = { category: 0, view: "all", search: "", page: 0 };
const marked = new Set();

const isAll = () => isSeveral && state.category === 0;
const thresholdOf = (image) => thresholds[image.category];
const isFlagged = (image) => !(image.score <= thresholdOf(image)); // what cannot be scored does not pass
const imagesOf = (category) =>
  isSeveral && category === 0 ? data.images : data.images.filter((image) => image.category === category);

function countsOf(category) {
  const counts = { normal: 0, defective: 0, false_alarms: 0, misses: 0, flagged: 0, images: 0 };
  for (const image of imagesOf(category)) {
    const flagged = isFlagged(image);
    counts.images += 1;
    counts.flagged += flagged;
    if (image.defective === true) {
      counts.defective += 1;
      counts.misses += !flagged;
    } else if (image.defective === false) {
      counts.normal += 1;
      counts.false_alarms += flagged;
    }
  }
  counts.hits = counts.defective - counts.misses;
  return counts;
}

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
const plain = (value) => (value === null || Number.isNaN(value) ? "–" : String(+value.toPrecision(4)));

/** How many times the model's own threshold a normalised score is; null where that has no meaning. */
function multiple(score, threshold) {
  if (!data.normalised || !(score >= 0 && score < 1)) return null;
  return ((score / (1 - score)) * (1 - threshold)) / threshold;
}

function rawThreshold(category) {
  const { raw } = data.categories[category];
  const value = thresholds[category];
  return data.normalised && raw !== null && value >= 0 && value < 1 ? (raw * value) / (1 - value) : null;
}

// ---------------------------------------------------------------- plots

let plots = null;

class Plots {
  constructor(figures) {
    this.figures = figures;
  }

  static async draw() {
    const items = read("plots");
    const figures = {};
    for (const [id, item] of Object.entries(items)) {
      if (!element(id)) continue;
      const manager = await Bokeh.embed.embed_item(item, id);
      figures[id] = manager.roots[0].model;
    }
    return new Plots(figures);
  }

  find(figure, name) {
    return this.figures[figure].document.get_model_by_name(name);
  }

  show(category) {
    const { histogram, curve } = data.categories[category];
    for (const [label, images] of Object.entries(histogram)) {
      const source = this.find("histogram", label);
      source.data = { ...source.data, images };
      const key = document.querySelector(`[data-key="${label}"]`);
      if (key) key.hidden = images.every((count) => count === 0);
    }
    const line = this.find("histogram", "threshold");
    line.visible = !isAll() || data.normalised;
    line.location = thresholds[category];
    const counts = countsOf(category);
    element("histogram").setAttribute(
      "aria-label",
      `Histogram of ${counts.images} scores; ${counts.flagged} images are above the threshold.`,
    );
    if (!this.figures.curve) return;
    this.find("curve", "curve").data = curve;
    const isDefined = curve.recall.length > 0;
    element("curve").hidden = !isDefined;
    element("no-curve").hidden = isDefined;
    const shown = isDefined && counts.flagged > 0;
    const flagged = counts.hits + counts.false_alarms;
    const point = { recall: [counts.hits / counts.defective], precision: [counts.hits / flagged] };
    this.find("curve", "point").data = shown && flagged ? point : { recall: [], precision: [] };
    element("curve").setAttribute(
      "aria-label",
      `Precision over recall; at the threshold, precision ${percent(counts.hits, flagged)}, ` +
        `recall ${percent(counts.hits, counts.defective)}.`,
    );
  }

  /** Give axes, grids and the threshold's line the colours of the text around them. */
  recolour() {
    const style = getComputedStyle(document.body);
    const text = style.color;
    const probe = document.createElement("i");
    probe.style.color = "var(--line)";
    document.body.append(probe);
    const faint = getComputedStyle(probe).color;
    probe.remove();
    for (const figure of Object.values(this.figures)) {
      for (const axis of [...figure.below, ...figure.left]) {
        axis.axis_label_text_color = axis.major_label_text_color = text;
        axis.axis_line_color = axis.major_tick_line_color = faint;
      }
      for (const part of figure.center) if ("grid_line_color" in part.properties) part.grid_line_color = faint;
    }
    this.find("histogram", "threshold").line_color = text;
  }
}

// ---------------------------------------------------------------- table and threshold

function showTable() {
  for (const row of document.querySelectorAll("#categories tbody tr")) {
    const category = +row.dataset.category;
    const counts = countsOf(category);
    const texts = {
      threshold: isSeveral && category === 0 ? "each its own" : plain(rawThreshold(category) ?? thresholds[category]),
      false_alarms: `${counts.false_alarms} (${percent(counts.false_alarms, counts.normal)})`,
      misses: String(counts.misses),
      detected: percent(counts.hits, counts.defective),
      flagged: `${counts.flagged} (${percent(counts.flagged, counts.images)})`,
    };
    for (const [figure, text] of Object.entries(texts)) {
      const cell = row.querySelector(`[data-figure="${figure}"]`);
      if (cell) cell.textContent = text;
    }
    row.classList.toggle("chosen", category === state.category);
    row.querySelector("button").setAttribute("aria-pressed", String(category === state.category));
  }
}

function showThreshold() {
  const threshold = thresholds[state.category];
  element("several").hidden = !isAll();
  element("one").hidden = isAll();
  element("meaning").hidden = isAll();
  element("slider").value = threshold;
  if (document.activeElement !== element("value")) element("value").value = plain(threshold);
  element("slider").setAttribute("aria-valuetext", plain(threshold));
  const own = data.categories[state.category].threshold;
  const times = multiple(threshold, own);
  const raw = rawThreshold(state.category);
  const parts = [];
  if (times !== null) parts.push(threshold === own ? "The model's own threshold" : `${plain(times)} × the model's own threshold`);
  else parts.push(threshold === own ? "Where the slider begins" : "Moved");
  if (raw !== null) parts.push(`raw score ${plain(raw)}`);
  element("meaning").textContent = `${parts.join(", ")}.`;
  element("reset").disabled = threshold === own;
}

function showTiles() {
  const counts = countsOf(state.category);
  const flagged = counts.hits + counts.false_alarms;
  const tiles = {
    false_alarms: [counts.false_alarms, `${percent(counts.false_alarms, counts.normal)} of ${counts.normal} normal`],
    misses: [counts.misses, `${percent(counts.misses, counts.defective)} of ${counts.defective} defective`],
    detected: [percent(counts.hits, counts.defective), `${counts.hits} of ${counts.defective}`],
    precision: [percent(counts.hits, flagged), `${counts.hits} of ${flagged} above`],
    flagged: [counts.flagged, `${percent(counts.flagged, counts.images)} of ${counts.images}`],
  };
  for (const tile of document.querySelectorAll("[data-tile]")) {
    const [value, explanation] = tiles[tile.dataset.tile];
    const small = document.createElement("small");
    small.textContent = explanation;
    tile.replaceChildren(String(value), small);
  }
}

// ---------------------------------------------------------------- gallery

const VIEWS = {
  misses: { belongs: (image) => image.defective === true && !isFlagged(image), rank: (image) => margin(image) },
  false_alarms: { belongs: (image) => image.defective === false && isFlagged(image), rank: (image) => -margin(image) },
  flagged: { belongs: isFlagged, rank: (image) => -margin(image) },
  nearest: { belongs: (image) => !Number.isNaN(image.score), rank: (image) => Math.abs(margin(image)) },
  all: { belongs: () => true, rank: (image) => -margin(image) },
};

const EMPTY = {
  misses: "No defective image is missed at this threshold.",
  false_alarms: "No normal image is above this threshold.",
  flagged: "No image is above this threshold.",
  nearest: "No image has a score.",
  all: "No image.",
};

/** By how much a score is above the threshold; what cannot be scored is above everything. */
const margin = (image) => (Number.isNaN(image.score) ? Infinity : image.score - thresholdOf(image));

let listed = [];

function list() {
  const own = imagesOf(state.category);
  for (const count of document.querySelectorAll("[data-count]")) {
    const { belongs } = VIEWS[count.dataset.count];
    count.textContent = count.dataset.count === "nearest" ? "" : own.filter(belongs).length;
  }
  const { belongs, rank } = VIEWS[state.view];
  const sought = state.search.toLowerCase();
  listed = own
    .filter((image) => belongs(image) && image.name.toLowerCase().includes(sought))
    .map((image) => [rank(image), image])
    .sort(([a, first], [b, second]) => (a === b ? first.number - second.number : a - b))
    .map(([, image]) => image);
}

function verdict(image) {
  const flagged = isFlagged(image);
  if (image.defective === null) return [flagged ? "Anomalous" : "Normal", false];
  if (image.defective) return flagged ? ["Detected", false] : ["Missed", true];
  return flagged ? ["False alarm", true] : ["Passed", false];
}

function showBadge(badge, image) {
  const [text, isWrong] = verdict(image);
  badge.textContent = text;
  badge.classList.toggle("wrong", isWrong);
}

function scoreText(image) {
  if (Number.isNaN(image.score)) return "no score";
  const times = multiple(image.score, thresholdOf(image));
  return `score ${image.score.toPrecision(3)}${times === null ? "" : ` · ${plain(+times.toPrecision(3))} × the threshold`}`;
}

/** The views of an image, cut out of its thumbnail: one in this file, else one in the folder beside it, if any. */
function fillViews(place, image) {
  const embedded = thumbnails[image.number];
  const source = embedded
    ? `data:image/webp;base64,${embedded}`
    : `${data.thumbnails}/${String(image.number).padStart(6, "0")}.webp`;
  place.style.setProperty("--count", image.views.length);
  place.replaceChildren();
  if (image.aspect === null) {
    showMissing(place);
    return;
  }
  image.views.forEach((name, index) => {
    const view = element("view-template").content.cloneNode(true);
    const shown = view.querySelector("img");
    shown.alt = `${name} of ${image.name}`;
    shown.style.objectPosition = `${image.views.length > 1 ? (100 * index) / (image.views.length - 1) : 50}% 50%`;
    shown.addEventListener("error", () => showMissing(place));
    shown.src = source;
    view.querySelector(".frame").style.setProperty("--aspect", image.aspect);
    view.querySelector(".caption").textContent = name;
    place.append(view);
  });
}

function showMissing(place) {
  const missing = document.createElement("span");
  missing.className = "without";
  missing.textContent = "Its picture is not in this file.";
  place.replaceChildren(missing);
}

function cardOf(image) {
  const card = element("card-template").content.cloneNode(true);
  showBadge(card.querySelector(".badge"), image);
  const name = card.querySelector(".name");
  name.textContent = `\u200e${image.name}`; // a path is cut at its beginning and still read from left to right
  name.title = image.name;
  card.querySelector(".score").textContent = scoreText(image);
  const views = card.querySelector(".views");
  views.setAttribute("aria-label", `Enlarge ${image.name}`);
  views.addEventListener("click", () => open(image));
  fillViews(views, image);
  const mark = card.querySelector(".mark");
  mark.checked = marked.has(image.number);
  mark.setAttribute("aria-label", `Mark ${image.name}`);
  mark.addEventListener("change", () => {
    marked[mark.checked ? "add" : "delete"](image.number);
    showMarked();
  });
  return card;
}

function showGallery() {
  list();
  const pages = Math.max(1, Math.ceil(listed.length / PER_PAGE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const first = state.page * PER_PAGE;
  element("cards").replaceChildren(...listed.slice(first, first + PER_PAGE).map(cardOf));
  element("empty").hidden = listed.length > 0;
  element("empty").textContent = state.search ? "No image of this name is among them." : EMPTY[state.view];
  element("page").value = state.page + 1;
  element("page").max = pages;
  element("pages").textContent = pages;
  for (const id of ["first", "previous"]) element(id).disabled = state.page === 0;
  for (const id of ["next", "last"]) element(id).disabled = state.page === pages - 1;
}

function turnTo(page) {
  state.page = page;
  showGallery();
  element("gallery").scrollIntoView({ block: "start" });
}

// ---------------------------------------------------------------- marked images

function showMarked() {
  const count = marked.size;
  element("marked").textContent = count === 0 ? "No image is marked." : `${count} marked.`;
  element("download").disabled = count === 0;
}

function download() {
  const names = data.images.filter((image) => marked.has(image.number)).map((image) => `${data.folder}${image.name}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(names, { type: "text/plain" }));
  link.download = "marked-images.txt";
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---------------------------------------------------------------- an image at large

let opened = 0;

function open(image) {
  opened = listed.indexOf(image);
  showDetail();
  if (!element("detail").open) element("detail").showModal();
}

function showDetail() {
  const image = listed[opened];
  const dialog = element("detail");
  element("detail-title").textContent = image.name;
  showBadge(dialog.querySelector(".badge"), image);
  fillViews(dialog.querySelector(".views"), image);
  const times = multiple(image.score, thresholdOf(image));
  const facts = {
    Category: data.categories[image.category].name,
    "Taken for": image.inferred === data.categories[image.category].name ? null : image.inferred,
    Label: image.defective === null ? null : image.defective ? "defective" : "normal",
    Score: Number.isNaN(image.score) ? "none" : plain(image.score),
    Threshold: plain(thresholdOf(image)),
    "Times the threshold": times === null ? null : plain(times),
    "Raw score": image.raw === null ? null : plain(image.raw),
    "Out-of-distribution score": image.ood === null ? null : `${plain(image.ood)}${image.ood > 1 ? " (unknown)" : ""}`,
  };
  const entries = Object.entries(facts).filter(([, value]) => value !== null);
  dialog.querySelector(".facts").replaceChildren(
    ...entries.map(([name, value]) => {
      const fact = document.createElement("div");
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      text.textContent = value;
      fact.append(term, text);
      return fact;
    }),
  );
  element("before").disabled = opened === 0;
  element("after").disabled = opened === listed.length - 1;
}

function step(by) {
  if (listed[opened + by] === undefined) return;
  opened += by;
  showDetail();
}

// ---------------------------------------------------------------- what people do

function show() {
  showTable();
  showThreshold();
  showTiles();
  plots?.show(state.category);
  showGallery();
}

let isWaiting = false;

/** Show changes once a frame: a slider reports more of them than a screen can show. */
function showSoon() {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    isWaiting = false;
    show();
  });
}

function choose(category) {
  state.category = category;
  state.page = 0;
  if (element("category")) element("category").value = category;
  show();
}

function move(threshold) {
  if (!Number.isFinite(threshold)) return;
  thresholds[state.category] = threshold;
  state.page = 0;
  showSoon();
}

function listen() {
  for (const button of document.querySelectorAll("[data-choose]")) {
    button.addEventListener("click", () => choose(+button.dataset.choose));
  }
  element("category")?.addEventListener("change", (event) => choose(+event.target.value));
  element("slider").addEventListener("input", (event) => move(event.target.valueAsNumber));
  element("value").addEventListener("input", (event) => move(event.target.valueAsNumber));
  element("reset").addEventListener("click", () => move(data.categories[state.category].threshold));
  for (const choice of document.querySelectorAll("[name=view]")) {
    choice.addEventListener("change", () => {
      state.view = choice.value;
      state.page = 0;
      showGallery();
    });
  }
  element("search").addEventListener("input", (event) => {
    state.search = event.target.value;
    state.page = 0;
    showGallery();
  });
  element("first").addEventListener("click", () => turnTo(0));
  element("previous").addEventListener("click", () => turnTo(state.page - 1));
  element("next").addEventListener("click", () => turnTo(state.page + 1));
  element("last").addEventListener("click", () => turnTo(Infinity));
  element("page").addEventListener("change", (event) => turnTo((event.target.valueAsNumber || 1) - 1));
  element("download").addEventListener("click", download);
  element("close").addEventListener("click", () => element("detail").close());
  element("before").addEventListener("click", () => step(-1));
  element("after").addEventListener("click", () => step(1));
  element("detail").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
}

const theme = remembered();
if (theme) root.dataset.theme = theme;
element("theme").addEventListener("click", () => chooseTheme(isDark() ? "light" : "dark"));
systemIsDark.addEventListener("change", showTheme);
showTheme();
if (data.images.length) {
  const choices = [...document.querySelectorAll("[name=view]")];
  const choice = choices.find(({ value }) => data.images.some(VIEWS[value].belongs));
  choice.checked = true;
  state.view = choice.value;
  listen();
  show();
  Plots.draw().then((drawn) => {
    plots = drawn;
    plots.recolour();
    plots.show(state.category);
  });
}

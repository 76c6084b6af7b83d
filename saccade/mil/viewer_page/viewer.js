// The viewer's page: OpenSeadragon shows slide and heatmap, a canvas above it contours and tiles.
"use strict";

const element = (id) => document.getElementById(id);
const controls = { slide: element("slide"), map: element("map"), opacity: element("opacity") };
const SMALLEST_TILE = 3; // screen pixels; smaller tiles would be one grey area

const viewer = OpenSeadragon({
  id: "view",
  showNavigationControl: false,
  showNavigator: true,
  gestureSettingsMouse: { clickToZoom: false },
  maxZoomPixelRatio: 4,
});
const outlines = document.createElement("canvas");
outlines.className = "outlines";
element("view").append(outlines);

// What is shown: number and facts of the slide, rings, tiles, numbers of the map, and the heatmap's own image.
let shown = { number: 0, facts: null, rings: [], tiles: null, scores: null, overlay: null };

async function get(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${await response.text()}`);
  return response.json();
}

function tell(text) {
  element("info").textContent = text;
}

function options(select, names, none) {
  const all = none === null ? names : [none, ...names];
  select.replaceChildren(...all.map((name, index) => new Option(name, none === null ? index : index - 1)));
}

async function openSlide(number) {
  const facts = await get(`slides/${number}`);
  const [rings, tiles] = await Promise.all([get(`slides/${number}/contours`), get(`slides/${number}/tiles`)]);
  shown = { number, facts, rings, tiles, scores: null, overlay: null };
  options(controls.map, facts.maps, "none");
  viewer.open({
    width: facts.width,
    height: facts.height,
    tileSize: facts.tile,
    tileOverlap: 0,
    minLevel: 0,
    maxLevel: facts.levels,
    getTileUrl: (level, x, y) => `slides/${number}/zoom/${level}/${x}_${y}.jpg`,
  });
  const resolution = facts.mpp === null ? "resolution unknown" : `${facts.mpp.toPrecision(4)} um/px`;
  const count = tiles.coords.length;
  tell(`${facts.id}   ${facts.width} x ${facts.height}   ${resolution}   ${count} tiles`);
}

async function showMap(index) {
  if (shown.overlay) viewer.world.removeItem(shown.overlay);
  shown.overlay = shown.scores = null;
  draw();
  if (index < 0) return;
  const current = shown;
  const scores = await get(`slides/${current.number}/maps/${index}`);
  if (current !== shown || Number(controls.map.value) !== index) return; // chosen anew meanwhile
  shown.scores = scores;
  viewer.addSimpleImage({
    url: `slides/${current.number}/maps/${index}.png`,
    opacity: Number(controls.opacity.value) / 100,
    x: 0,
    y: 0,
    width: current.facts.map_width / current.facts.width,
    success: (event) => {
      if (current === shown && shown.scores === scores) shown.overlay = event.item;
      else viewer.world.removeItem(event.item);
    },
  });
  draw();
  tell(`${scores.name}: click a tile to see its score`);
}

// Screen position of the slide's corner, and screen pixels per pixel of level 0.
function placement() {
  const image = viewer.world.getItemAt(0);
  if (!image) return null;
  const origin = image.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
  const far = image.imageToViewerElementCoordinates(new OpenSeadragon.Point(shown.facts.width, 0));
  return { x: origin.x, y: origin.y, scale: (far.x - origin.x) / shown.facts.width };
}

function draw() {
  const box = element("view");
  const ratio = window.devicePixelRatio || 1;
  outlines.width = box.clientWidth * ratio;
  outlines.height = box.clientHeight * ratio;
  outlines.style.width = `${box.clientWidth}px`;
  outlines.style.height = `${box.clientHeight}px`;
  const place = shown.facts ? placement() : null;
  if (!place) return;
  const pen = outlines.getContext("2d");
  pen.scale(ratio, ratio);
  if (element("grid").checked) drawTiles(pen, place, box);
  if (element("contours").checked) drawContours(pen, place);
}

function drawContours(pen, place) {
  pen.strokeStyle = "rgb(0, 130, 60)";
  pen.lineWidth = 2;
  pen.beginPath();
  for (const ring of shown.rings) {
    ring.forEach(([x, y], index) => {
      const point = [place.x + x * place.scale, place.y + y * place.scale];
      if (index) pen.lineTo(...point);
      else pen.moveTo(...point);
    });
    pen.closePath();
  }
  pen.stroke();
}

function drawTiles(pen, place, box) {
  const { coords, size } = shown.scores || shown.tiles;
  const wide = size[0] * place.scale;
  const high = size[1] * place.scale;
  if (wide < SMALLEST_TILE) return;
  pen.strokeStyle = "rgba(40, 70, 160, 0.7)";
  pen.lineWidth = 1;
  pen.beginPath();
  for (const [x, y] of coords) {
    const left = place.x + x * place.scale;
    const top = place.y + y * place.scale;
    if (left < box.clientWidth && top < box.clientHeight && left + wide > 0 && top + high > 0) {
      pen.rect(left, top, wide, high);
    }
  }
  pen.stroke();
}

function describeTile(x, y) {
  const { coords, size, scores, percentiles } = shown.scores || shown.tiles;
  const found = [];
  coords.forEach(([left, top], index) => {
    if (x < left || y < top || x >= left + size[0] || y >= top + size[1]) return;
    const score = scores ? `   score ${scores[index]}   percentile ${percentiles[index]}` : "";
    found.push(`tile ${index} at (${left}, ${top})${score}`);
  });
  tell(found.length ? found.join("\n") : `no tile at (${Math.round(x)}, ${Math.round(y)})`);
}

viewer.addHandler("canvas-click", (event) => {
  const image = viewer.world.getItemAt(0);
  if (!event.quick || !image) return;
  const point = image.viewerElementToImageCoordinates(event.position);
  describeTile(point.x, point.y);
});
for (const event of ["update-viewport", "open", "resize"]) viewer.addHandler(event, draw);

function attempt(action) {
  action.catch((error) => tell(error.message));
}

controls.slide.addEventListener("change", () => attempt(openSlide(Number(controls.slide.value))));
controls.map.addEventListener("change", () => attempt(showMap(Number(controls.map.value))));
controls.opacity.addEventListener("input", () => {
  if (shown.overlay) shown.overlay.setOpacity(Number(controls.opacity.value) / 100);
});
for (const id of ["contours", "grid"]) element(id).addEventListener("change", draw);
element("home").addEventListener("click", () => viewer.viewport.goHome());
element("controls").addEventListener("submit", (event) => event.preventDefault());

// #SLIDE or #SLIDE,MAP shows a slide, and a map of it, by number.
async function start() {
  const slides = await get("slides");
  options(controls.slide, slides.map((slide) => slide.id), null);
  const [slide, map] = location.hash.slice(1).split(",").map(Number);
  controls.slide.value = slide < slides.length ? slide : 0;
  await openSlide(Number(controls.slide.value));
  if (map >= 0 && map < shown.facts.maps.length) {
    controls.map.value = map;
    viewer.addOnceHandler("open", () => attempt(showMap(map)));
  }
}
attempt(start());

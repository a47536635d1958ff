"use strict";
// Pages, search and order. Without this script, the whole tables are shown, worst first.
const find = document.querySelector(".find");
const tables = [...document.querySelectorAll("section")].map((section) => {
  const rows = [...section.querySelectorAll("tbody tr")];
  return {
    section, rows, size: Number(section.dataset.rows), page: 0, kept: rows,
    body: section.querySelector("tbody"), controls: [...section.querySelectorAll(".controls")],
    texts: new Map(rows.map((row, worst) => [row, { worst, text: row.textContent.toLowerCase() }])),
  };
});

function show(table) {
  const pages = Math.max(1, Math.ceil(table.kept.length / table.size));
  table.page = Math.min(Math.max(table.page, 0), pages - 1);
  const first = table.page * table.size, shown = table.kept.slice(first, first + table.size);
  table.body.replaceChildren(...shown);
  for (const controls of table.controls) {
    controls.hidden = pages === 1;
    controls.querySelector(".place").textContent =
      `${first + 1} to ${first + shown.length} of ${table.kept.length}`;
    controls.querySelector(".previous").disabled = table.page === 0;
    controls.querySelector(".next").disabled = table.page === pages - 1;
  }
}

function update() {
  const words = find.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
  const order = find.querySelector("select")?.value ?? "worst";
  for (const table of tables) {
    table.kept = table.rows.filter((row) => words.every((word) => table.texts.get(row).text.includes(word)));
    const worst = (row) => table.texts.get(row).worst;
    const ssim = (row) => (row.dataset.ssim ? Number(row.dataset.ssim) : 2);
    const name = (row) => row.querySelector("bdi").textContent;
    const by = {
      worst: (a, b) => worst(a) - worst(b),
      ssim: (a, b) => ssim(a) - ssim(b) || worst(a) - worst(b),
      run: (a, b) => a.dataset.run - b.dataset.run,
      name: (a, b) => name(a).localeCompare(name(b)) || worst(a) - worst(b),
    }[table.section.id === "latents" ? order : "worst"];
    table.kept.sort(by);
    table.page = 0;
    show(table);
    table.section.hidden = words.length > 0 && table.kept.length === 0;
  }
  const count = tables.reduce((sum, table) => sum + table.kept.length, 0);
  find.querySelector(".found").textContent = words.length ? `${count} found` : "";
}

for (const table of tables) {
  for (const controls of table.controls) {
    const turn = (step) => () => {
      table.page += step;
      show(table);
      table.section.scrollIntoView();
    };
    controls.querySelector(".previous").addEventListener("click", turn(-1));
    controls.querySelector(".next").addEventListener("click", turn(1));
  }
}
find.addEventListener("submit", (event) => event.preventDefault());
find.addEventListener("input", update);
find.hidden = tables.length === 0;
update();

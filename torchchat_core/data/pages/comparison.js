"use strict";
const table = document.querySelector("table");
const headings = [...table.tHead.rows[0].cells];

function sortBy(column) {
  const heading = headings[column];
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const each of headings) each.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compared = (one, other) => {
    const [a, b] = [value(one), value(other)];
    const order = Number.isNaN(Number(a) + Number(b)) ? a.localeCompare(b) : Number(a) - Number(b);
    return ascending ? order : -order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compared));
}

headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => sortBy(column)));

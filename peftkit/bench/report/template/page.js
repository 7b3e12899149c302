"use strict";
// Without this script every number is on the page all the same. It sorts tables, and saves the document as a file.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(body, heads, head, column));
  });
}

// The first click sorts the best to the top, the next one turns it round. What has no value stays at the bottom.
function sort(body, heads, head, column) {
  const now = head.getAttribute("aria-sort");
  const turned = { ascending: "descending", descending: "ascending" }[now] || head.dataset.first;
  for (const other of heads) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", turned);
  const sign = turned === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const number = (text) => (text === undefined || text.trim() === "" ? NaN : Number(text));
  const order = (a, b) => {
    const left = value(a), right = value(b);
    if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
    const difference = number(left) - number(right);
    return sign * (Number.isNaN(difference) ? left.localeCompare(right) : difference);
  };
  body.append(...[...body.rows].sort(order));
}

const save = document.getElementById("save");
save.hidden = false;
save.addEventListener("click", () => {
  const text = JSON.stringify(JSON.parse(document.getElementById("document").textContent), null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text + "\n"], { type: "application/json" }));
  link.download = "peftkit-bench.json";
  link.click();
  URL.revokeObjectURL(link.href);
});

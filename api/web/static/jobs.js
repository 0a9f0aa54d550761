// The list of jobs: two of them can be compared.

function look() {
  const button = document.getElementById("compare");
  if (!button) return;
  const chosen = document.querySelectorAll("#chosen input[name=job]:checked").length;
  button.disabled = chosen !== 2;
  const hint = document.getElementById("compare-hint");
  const says = chosen === 2 ? "" : chosen > 2 ? `${chosen} jobs are chosen: two can be compared.` : "Choose two jobs to compare them.";
  if (hint.textContent !== says) hint.textContent = says; // Screen readers read out what is written, also where it is the same.
}

document.addEventListener("change", look);
document.addEventListener("htmx:after:swap", look);
look();

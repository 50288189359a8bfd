// Puts the page together.

async function main() {
  themeSwitch();
  await unpackCurves();
  tagLegend();
  configuration();
  leftOut();
  accuracy();
  curves();
  rewards();
  weights();
  curriculum();
  disparity();
  advantages();
  positions();
  critical();
  lengths();
  replay();
  ratios();
  projection();
  distances();
  restore();
  scrollBack(); // at once, and again when the completions have their place
  await viewer(REMEMBERED && REMEMBERED.viewer);
  scrollBack();
  live();
  document.documentElement.dataset.ready = "";
}

main();

// The widget library draws a slider's handle without a name for screen readers: give it the label that stands before it.
(function () {
  function name(handle) {
    const slider = handle.closest(".widget-inline-hbox, .jupyter-widget-inline-hbox, .widget-hbox");
    const label = slider && slider.querySelector(".widget-label, .jupyter-widget-label");
    handle.setAttribute("aria-label", (label && label.textContent.trim()) || "slider");
    const readout = slider && slider.querySelector(".widget-readout, .jupyter-widget-readout");
    if (readout) {
      const tell = () => handle.setAttribute("aria-valuetext", readout.textContent.trim());
      tell();
      new MutationObserver(tell).observe(readout, { childList: true, characterData: true, subtree: true });
    }
  }
  function nameAll() {
    document.querySelectorAll('[role="slider"]:not([aria-label])').forEach(name);
  }
  document.addEventListener("DOMContentLoaded", function () {
    nameAll();
    new MutationObserver(nameAll).observe(document.body, { childList: true, subtree: true });
  });
})();

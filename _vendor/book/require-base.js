// RequireJS looks for a module, and the widget library for its icon fonts, beside the page unless it is told otherwise.
// This has to run before RequireJS itself, which takes the variable `require` for its settings.
var require = { baseUrl: document.documentElement.dataset.content_root + "vendor" };

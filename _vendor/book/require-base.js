// The widget library's modules look for its icon fonts beside themselves. All of them come from one file, so RequireJS
// is told that they lie where that file lies. This has to run before RequireJS itself, which takes the variable
// `require` for its settings.
var require = {
  baseUrl: document.documentElement.dataset.content_root + "vendor",
  paths: {
    "@jupyter-widgets/base": "@jupyter-widgets/html-manager/dist/base",
    "@jupyter-widgets/base7": "@jupyter-widgets/html-manager/dist/base7",
    "@jupyter-widgets/controls": "@jupyter-widgets/html-manager/dist/controls",
    "@jupyter-widgets/controls7": "@jupyter-widgets/html-manager/dist/controls7",
    "@jupyter-widgets/html-manager": "@jupyter-widgets/html-manager/dist/html-manager",
    "@jupyter-widgets/html-manager/dist": "@jupyter-widgets/html-manager/dist",
  },
};

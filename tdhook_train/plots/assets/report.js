// Figures are drawn as they come into sight, in the colours that the reader's system asks for; all of them before print.
var report = (function () {
  'use strict';
  var settings = JSON.parse(document.getElementById('settings').textContent);
  var plots = [];
  var waiting = [];
  var dark = matchMedia('(prefers-color-scheme: dark)');
  var printed = matchMedia('print');
  var scale = 'log';
  var printing = false;
  var NARROW = 640;
  var PAGE = 680;

  function recoloured(value) {
    if (typeof value === 'string') {
      return settings.dark[value] || value;
    }
    if (Array.isArray(value)) {
      return value.map(recoloured);
    }
    if (value && typeof value === 'object' && !value.bdata) {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = recoloured(value[key]); });
      return copy;
    }
    return value;
  }

  // a name a row instead of one a cell
  function spread(trace) {
    if (trace.type === 'heatmap' && trace.meta) {
      trace.text = trace.meta.names.map(function (name) { return new Array(trace.meta.columns).fill(name); });
    }
    return trace;
  }

  function put(layout, path, value) {
    var parts = path.split('.');
    layout[parts[0]][parts[1]] = value;
  }

  function slim(layout) {
    layout.margin.l = 4;
    layout.margin.r = 4;
    layout.legend.font = { size: 10 };
    var bar = layout.coloraxis && layout.coloraxis.colorbar;
    if (bar) {
      bar.thickness = 8;
      bar.title.font = { size: 10 };
      bar.tickfont = { size: 9 };
      bar.lenmode = 'pixels';
      bar.len = 240;
    }
  }

  function draw(plot) {
    var isDark = dark.matches && !printing;
    var width = printing ? PAGE : plot.clientWidth;
    var figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    var layout = width < NARROW && figure.narrow ? figure.narrow : figure.layout;
    var data = figure.data.map(spread);
    var switches = layout.meta && layout.meta[scale];
    Object.keys(switches || {}).forEach(function (path) { put(layout, path, switches[path]); });
    layout.template = settings.template;
    if (width < NARROW) { slim(layout); }
    if (isDark) {
      data = recoloured(data);
      layout = recoloured(layout);
    }
    layout.width = printing ? PAGE : undefined;
    plot.style.height = layout.height + 'px';
    plot.dataset.looks = [isDark, width < NARROW, scale, printing].join();
    return Plotly.react(plot, data, layout, settings.config);
  }

  // those that were drawn, where they would look different now
  function again() {
    plots.forEach(function (plot) {
      var looks = [dark.matches && !printing, plot.clientWidth < NARROW, scale, printing].join();
      if (plot.dataset.looks && plot.dataset.looks !== looks) { draw(plot); }
    });
  }

  function print(begins) {
    if (printing === begins) { return; }
    printing = begins;
    plots.forEach(function (plot) { if (printing || plot.dataset.looks) { draw(plot); } });
  }

  // one a frame, so that the first is seen before the second is drawn
  function next() {
    var plot = waiting[0];
    if (!plot.dataset.looks) { draw(plot); }
    setTimeout(function () {
      waiting.shift();
      if (waiting.length) { requestAnimationFrame(next); }
    }, 0);
  }

  var sight = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      if (entry.isIntersecting && !entry.target.dataset.looks) {
        sight.unobserve(entry.target);
        waiting.push(entry.target);
        if (waiting.length === 1) { requestAnimationFrame(next); }
      }
    });
  }, { rootMargin: '300px' });

  dark.addEventListener('change', again);
  addEventListener('resize', again);
  addEventListener('beforeprint', function () { print(true); });
  addEventListener('afterprint', function () { print(false); });
  printed.addEventListener('change', function (event) { print(event.matches); });
  document.addEventListener('change', function (event) {
    if (event.target.name === 'scale') {
      scale = event.target.value;
      again();
    }
  });

  return function (id) {
    var plot = document.getElementById(id);
    plots.push(plot);
    sight.observe(plot);
  };
})();

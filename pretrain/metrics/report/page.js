// What is alive in the page: smoothed lines, ranges of values, logarithmic scales, one layer of many, the
// numbers under the pointer, and the colour scheme. A page that is replaced keeps what was chosen.
const farspan = (() => {
  "use strict"
  const SPANS = [0, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6]
  const STATE = "farspan:view"
  let view = { smoothing: null, kind: "mean", logs: [], layers: {}, theme: "auto" }
  let charts = []
  let steps = null
  let smoothing = 0
  let pointed = null
  let is_waiting = false

  const $ = (selector, within = document) => within.querySelector(selector)
  const all = (selector, within = document) => [...within.querySelectorAll(selector)]

  // A file may not be allowed to store anything.
  const remember = () => { try { sessionStorage.setItem(STATE, JSON.stringify(view)) } catch {} }
  const recall = () => { try { return JSON.parse(sessionStorage.getItem(STATE)) ?? {} } catch { return {} } }

  const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]
  const compact = (value) => {
    for (const [size, prefix] of PREFIXES)
      if (Math.abs(value) >= size) return `${digits(value / size)} ${prefix}`
    return `${digits(value)} `
  }
  const digits = (value, count = 4) => {
    if (value == 0) return "0"
    const size = Math.abs(value)
    if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e-", "e−").replace(/^-/, "−")
    if (size >= 10 ** count) return Math.round(value).toLocaleString("en-US").replace("-", "−")
    return String(Number(value.toPrecision(count))).replace("-", "−")
  }
  const format = (value, unit) => {
    if (value == null || Number.isNaN(value)) return "not finite"
    if (unit == "share") return `${digits(100 * value, 3)} %`
    if (unit == "bytes") return `${compact(value)}B`
    if (unit == "tokens" || unit == "tokens/s") return compact(value).trim()
    return digits(value)
  }

  const last_at = (step, at) => {
    let low = 0, high = step.length
    while (low < high) {
      const middle = (low + high) >> 1
      if (step[middle] <= at) low = middle + 1
      else high = middle
    }
    return low - 1
  }
  const nearest = (step, at) => {
    const before = last_at(step, at)
    if (before + 1 >= step.length) return before
    if (before < 0) return 0
    return at - step[before] <= step[before + 1] - at ? before : before + 1
  }

  // Means whose weights fall with the distance in steps, without the bias of their start.
  const mean = (step, value, span) => {
    const result = new Float32Array(value.length).fill(NaN)
    let total = 0, weight = 0, at = 0
    for (let i = 0; i < value.length; i++) {
      if (!Number.isFinite(value[i])) continue
      const keep = Math.exp(-2 * (step[i] - at) / span)
      total = keep * total + value[i]
      weight = keep * weight + 1
      result[i] = total / weight
      at = step[i]
    }
    return result
  }
  const median = (step, value, span) => {
    const result = new Float32Array(value.length).fill(NaN)
    const sorted = []
    const place = (number) => {
      let low = 0, high = sorted.length
      while (low < high) {
        const middle = (low + high) >> 1
        if (sorted[middle] < number) low = middle + 1
        else high = middle
      }
      return low
    }
    let from = 0, to = 0
    for (let i = 0; i < value.length; i++) {
      while (to < value.length && step[to] <= step[i] + span / 2) {
        if (Number.isFinite(value[to])) sorted.splice(place(value[to]), 0, value[to])
        to++
      }
      while (step[from] < step[i] - span / 2) {
        if (Number.isFinite(value[from])) sorted.splice(place(value[from]), 1)
        from++
      }
      if (!Number.isFinite(value[i])) continue
      const half = sorted.length >> 1
      result[i] = sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2
    }
    return result
  }

  const span_of = (index) => SPANS[Math.min(index, SPANS.length - 1)]
  // A longer run has more of them, and a wider one unless somebody has chosen.
  const offer_spans = () => {
    const length = steps.bounds[1] - steps.bounds[0]
    const largest = (limit) => SPANS.findLastIndex((span) => span <= limit)
    const most = Math.max(1, largest(length / 2))
    smoothing = Math.min(view.smoothing ?? largest(Math.max(5, length / 50)), most)
    $("#smoothing").max = most
    $("#smoothing").value = smoothing
  }
  const smooth = () => {
    const span = span_of(smoothing)
    for (const { lines } of charts) {
      for (const { raw, smoothed, means } of lines) {
        if (!smoothed) continue
        raw.glyph.line_alpha = span ? 0.3 : 1
        if (!span) {
          smoothed.data_source.data = { step: [], value: [] }
          continue
        }
        const of = means ?? raw.data_source
        const { step, value } = of.data
        smoothed.data_source.data = { step, value: (view.kind == "mean" ? mean : median)(step, value, span) }
      }
    }
    $("#span").textContent = span ? `${span.toLocaleString("en-US")} steps` : "off"
  }

  const extent = ({ lines }, is_log) => {
    let low = Infinity, high = -Infinity
    for (const { raw } of lines) {
      const { step, value } = raw.data_source.data
      const first = Math.max(0, last_at(step, steps.start))
      const stop = Math.min(step.length, last_at(step, steps.end) + 2)
      for (let i = first; i < stop; i++) {
        if (!Number.isFinite(value[i]) || (is_log && value[i] <= 0)) continue
        low = Math.min(low, value[i])
        high = Math.max(high, value[i])
      }
    }
    return [low, high]
  }
  const fit = (chart) => {
    const is_log = chart.is_log
    let [low, high] = extent(chart, is_log)
    if (low > high) return
    if (is_log) {
      const room = Math.max((high / low) ** 0.05, 1.01)
      chart.figure.y_range.setv({ start: low / room, end: high * room })
      return
    }
    if (chart.from_zero && low >= 0) low = 0
    const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || (chart.unit == "share" ? 0.01 : 1)
    chart.figure.y_range.setv({ start: low - (low == 0 && chart.from_zero ? 0 : room), end: high + room })
  }
  const fit_all = () => { for (const chart of charts) if (chart.lines.length) fit(chart) }

  const set_log = (chart, is_log, scales) => {
    const { figure } = chart
    if (is_log && extent(chart, true)[0] == Infinity) return
    chart.is_log = is_log
    fit(chart)
    figure.y_scale = is_log ? scales.log : scales.linear
    const [linear, log] = figure.left
    for (const grid of figure.center) if (grid.dimension == 1) grid.axis = is_log ? log : linear
    linear.visible = !is_log
    log.visible = is_log
    $(".log", chart.element)?.setAttribute("aria-pressed", is_log)
  }

  // Of each line the value at the pointer, or the last one.
  const show_values = () => {
    is_waiting = false
    for (const { element, lines, maps, unit } of charts) {
      for (const bound of ["low", "high"]) {
        const shown = $(`.${bound}`, element)
        if (shown) shown.textContent = format(maps[0].data_source.data[bound][0], unit)
      }
      lines.forEach(({ raw, smoothed }, i) => {
        const { step, value } = raw.data_source.data
        const at = pointed == null ? step.length - 1 : nearest(step, pointed)
        const shown = all(".key b", element)[i]
        if (!shown) return
        shown.textContent = at < 0 ? "" : format(value[at], unit)
        const near = smoothed?.data_source.data
        const drawn = near?.step.length ? nearest(near.step, step[at]) : -1
        const mean = all(".key i", element)[i]
        if (mean) mean.textContent = drawn < 0 ? "" : format(near.value[drawn], unit)
      })
    }
    const at = $("#pointed")
    if (at) at.textContent = pointed == null ? "" : `step ${Math.round(pointed).toLocaleString("en-US")}`
  }
  const point = (step) => {
    pointed = step
    if (!is_waiting) requestAnimationFrame(show_values)
    is_waiting = true
  }

  const show_layer = (chart, number) => {
    const at = Math.min(number, chart.maps.length - 1)
    chart.maps.forEach((map, i) => { map.visible = i == at })
    const slider = $(".layer", chart.element)
    if (!slider) return
    slider.value = at
    $(".layers output", chart.element).textContent = `${at + 1} of ${chart.maps.length}`
  }

  const repaint = () => {
    for (const { figure } of charts) Bokeh.index.find_one(figure)?.request_paint()
  }
  const set_theme = (theme) => {
    view.theme = theme
    document.documentElement.dataset.theme = theme
    for (const button of all("[data-scheme]")) button.setAttribute("aria-pressed", button.dataset.scheme == theme)
    repaint()
  }

  const as_chart = (figure) => {
    const [tags] = figure.tags
    const named = (name) => figure.renderers.filter((renderer) => renderer.name == name)
    const smoothed = new Map(named("smooth").map((it) => [it.data_source.name, it]))
    const means = new Map((tags.means ?? []).map((source) => [source.name, source]))
    const lines = named("raw").map((raw) => {
      const { name } = raw.data_source
      return { raw, smoothed: smoothed.get(`${name}:smooth`), means: means.get(`${name}:mean`) }
    })
    const maps = tags.map ? figure.renderers : []
    const element = all("figure[data-chart]").find((it) => it.dataset.chart == figure.name)
    return { figure, element, lines, maps, unit: tags.unit, from_zero: tags.from_zero, is_log: false }
  }

  const listen = (scales) => {
    const { start, end } = steps.properties
    let is_fitting = false
    for (const bound of [start, end]) bound.change.connect(() => {
      if (!is_fitting) setTimeout(() => { is_fitting = false; fit_all() })
      is_fitting = true
    })
    const is_touched = matchMedia("(pointer: coarse)").matches
    for (const chart of charts) {
      const { figure, element } = chart
      // On a touch screen dragging scrolls the page; it zooms only where there is a mouse.
      figure.toolbar.tools[0].active = !is_touched
      figure.on_event("doubletap", () => steps.setv({ start: steps.bounds[0], end: steps.bounds[1] }))
      for (const event of ["mousemove", "tap"]) figure.on_event(event, ({ x }) => point(x))
      figure.on_event("mouseleave", () => point(null))
      $(".log", element)?.addEventListener("click", () => {
        set_log(chart, !chart.is_log, scales)
        view.logs = charts.filter((it) => it.is_log).map((it) => it.figure.name)
        remember()
      })
      $(".explain", element)?.addEventListener("click", ({ currentTarget }) => {
        const about = $(".about", element)
        about.hidden = !about.hidden
        currentTarget.setAttribute("aria-expanded", !about.hidden)
      })
      $(".layer", element)?.addEventListener("input", ({ target }) => {
        view.layers[figure.name] = Number(target.value)
        show_layer(chart, view.layers[figure.name])
        remember()
      })
    }
    $("#smoothing").addEventListener("input", ({ target }) => {
      view.smoothing = smoothing = Number(target.value)
      smooth()
      show_values()
      remember()
    })
    $("#kind").addEventListener("change", ({ target }) => {
      view.kind = target.value
      smooth()
      show_values()
      remember()
    })
    document.addEventListener("farspan:data", () => { offer_spans(); smooth(); fit_all(); show_values() })
  }

  // What is empty has no heading.
  const hide_empty = () => {
    for (const part of all("[data-part]")) part.hidden = !all(":scope > [data-fragment]", part).some((it) => it.innerHTML.trim())
    for (const section of all("main > section")) {
      section.hidden = !all("[data-part]", section).some((part) => !part.hidden) && !$(".charts", section)
      const link = $(`nav a[href="#${section.id}"]`)
      if (link) link.hidden = section.hidden
    }
  }

  const start = (figures, scales) => {
    steps = figures[0].x_range
    charts = figures.map(as_chart)
    offer_spans()
    $("#kind").value = view.kind
    smooth()
    fit_all()
    for (const chart of charts) {
      if (view.logs.includes(chart.figure.name)) set_log(chart, true, scales)
      if (chart.maps.length > 1) show_layer(chart, view.layers[chart.figure.name] ?? 0)
    }
    show_values()
    listen(scales)
  }

  // Charts are drawn when they come into sight: all at once would take seconds.
  const see = (plot) => {
    plot.classList.remove("unseen")
    seen.unobserve(plot)
  }
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) see(target)
  }, { rootMargin: "500px" })
  for (const plot of all(".plot")) seen.observe(plot)
  addEventListener("beforeprint", () => all(".plot.unseen").forEach(see))

  view = { ...view, ...recall() }
  document.addEventListener("farspan:data", hide_empty)
  set_theme(view.theme)
  for (const button of all("[data-scheme]")) button.addEventListener("click", () => {
    set_theme(button.dataset.scheme)
    remember()
  })
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint)
  return { start, format }
})()

// Follows the runs: asks where the page came from for what is new, replaces it in place, and says so when
// there is no answer. Zoom, smoothing and scales stay as they are.
(() => {
  "use strict"
  const ZOOM = "farspan:zoom"
  const RELOADED_FOR = "farspan:reloaded-for"
  const LONGEST_WAIT_S = 30
  const TIMEOUT_MS = 60_000
  const TYPES = { float32: Float32Array, float64: Float64Array, uint8: Uint8Array, int32: Int32Array, int64: BigInt64Array }

  let version = ""
  let layout = null
  let wait_s = 2
  let away_since = null
  let is_due = false

  const models = () => (window.Bokeh?.documents ?? []).flatMap((it) => [...it.all_models])
  const sources_by_name = () => new Map(models().filter((it) => it.type == "ColumnDataSource").map((it) => [it.name, it]))
  const steps_shown = () => models().find((it) => it.type == "Range1d" && it.name == "steps") ?? null
  const is_drawn = () => !document.querySelector("[data-root-id]") || steps_shown() != null

  const say = (text, is_away) => {
    const element = document.getElementById("live")
    if (element.textContent != text) element.textContent = text
    element.classList.toggle("away", is_away)
  }

  const decoded = ({ dtype, data }) => new TYPES[dtype](Uint8Array.from(atob(data), (it) => it.charCodeAt(0)).buffer)
  // Columns that are kept, and those after them. Bokeh's arrays know their shape.
  const image = (old, news) => {
    const { kept, shape } = news
    const [rows, width] = shape
    const values = decoded(news)
    const joined = new values.constructor(rows * width)
    for (let row = 0; row < rows; row++) {
      const before = row * old.shape[1]
      joined.set(old.slice(before, before + kept), row * width)
      joined.set(values.subarray(row * (width - kept), (row + 1) * (width - kept)), row * width + kept)
    }
    return new old.constructor(joined, shape)
  }
  const column = (old, news) => {
    if ("values" in news) return news.values
    if ("images" in news) return news.images.map((it, i) => image(old[i], it))
    const values = decoded(news)
    const joined = new values.constructor(news.kept + values.length)
    joined.set(old.slice(0, news.kept))
    joined.set(values, news.kept)
    return joined
  }
  const replace_sources = (sources) => {
    const by_name = sources_by_name()
    for (const [name, columns] of Object.entries(sources)) {
      const source = by_name.get(name)
      if (!source) continue
      const data = { ...source.data }
      for (const [key, news] of Object.entries(columns)) data[key] = column(data[key], news)
      source.data = data
    }
  }

  // What was unfolded stays so.
  const replace_fragments = (fragments) => {
    for (const [id, html] of Object.entries(fragments)) {
      const element = document.getElementById(id)
      if (!element) continue
      const unfolded = [...element.querySelectorAll("details[open] > summary")].map((it) => it.textContent)
      element.innerHTML = html
      for (const summary of element.querySelectorAll("details > summary"))
        if (unfolded.includes(summary.textContent)) summary.parentElement.open = true
    }
  }

  const is_whole = (steps) => steps.start <= steps.bounds[0] && steps.end >= steps.bounds[1]
  const extend = ([first, last]) => {
    const steps = steps_shown()
    if (!steps) return
    const follows = is_whole(steps) || steps.start >= last
    steps.setv({ bounds: [first, last], min_interval: (last - first) / 1000 })
    if (follows) steps.setv({ start: first, end: last })
  }

  const store = (name, value) => {
    try { sessionStorage.setItem(name, JSON.stringify(value)); return true } catch { return false }
  }
  const stored = (name) => {
    try { return JSON.parse(sessionStorage.getItem(name)) } catch { return null }
  }
  const restore_zoom = () => {
    const zoom = stored(ZOOM)
    store(ZOOM, null)
    if (zoom) steps_shown()?.setv({ start: zoom[0], end: zoom[1] })
  }

  // Charts that are new need a new page: once, as a page that still lacks them would not be better.
  const reloads = (changes) => {
    const by_name = sources_by_name()
    const lacks =
      (layout != null && layout != changes.layout) ||
      Object.keys(changes.sources).some((name) => !by_name.has(name)) ||
      Object.keys(changes.fragments).some((id) => !document.getElementById(id))
    layout = changes.layout
    if (!lacks || stored(RELOADED_FOR) == layout) return false
    const steps = steps_shown()
    store(ZOOM, steps && !is_whole(steps) ? [steps.start, steps.end] : null)
    if (!store(RELOADED_FOR, layout)) return false
    location.reload()
    return true
  }

  const ask = async () => {
    const answer = await fetch(`changes?since=${version}`, { signal: AbortSignal.timeout(TIMEOUT_MS) })
    if (!answer.ok) throw new Error(await answer.text())
    return answer.json()
  }

  const take = (changes) => {
    if (reloads(changes)) return false
    extend(changes.step_range)
    replace_sources(changes.sources)
    replace_fragments(changes.fragments)
    document.dispatchEvent(new CustomEvent("farspan:data"))
    version = changes.version
    return true
  }
  const poll = async () => {
    try {
      const changes = await ask()
      if ("sources" in changes && !take(changes)) return
      wait_s = changes.poll_s
      away_since = null
      say(changes.state, false)
    } catch (error) {
      away_since ??= new Date()
      // What is known of this page may be half-replaced.
      version = ""
      wait_s = Math.min(LONGEST_WAIT_S, Math.max(2, wait_s * 2))
      const since = away_since.toLocaleTimeString()
      // What fetch throws where nobody answers says nothing.
      const why = error instanceof TypeError ? "Is farspan report --serve still running?" : error.message
      say(`No answer since ${since}. ${why} Asking again every ${wait_s} s.`, true)
    }
    setTimeout(poll_if_seen, 1000 * wait_s)
  }
  const poll_if_seen = () => {
    is_due = document.hidden
    if (!is_due) poll()
  }
  document.addEventListener("visibilitychange", () => { if (is_due) poll_if_seen() })

  const begin = () => {
    if (!is_drawn()) return setTimeout(begin, 50)
    restore_zoom()
    poll_if_seen()
  }
  begin()
})()

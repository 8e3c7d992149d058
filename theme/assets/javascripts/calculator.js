// refs/calculator.md: shows what calculator-data.js has of the chosen experiment, device, batch size and precision.
{
  const MIB = 2 ** 20, GIB = 2 ** 30
  const choice = Object.fromEntries(["experiment", "device", "batch-size", "precision"]
    .map(name => [name, document.getElementById(`calculator-${name}`)]))
  const answer = document.getElementById("calculator-answer")

  function element(name, ...children) {
    const made = document.createElement(name)
    made.append(...children)
    return made
  }

  function offer(select, values, chosen) {
    select.replaceChildren(...values.map(value => new Option(value, value, false, String(value) === String(chosen))))
  }

  // As repro_tools.memory rounds: two decimals of a GiB or MiB, two digits of hours or minutes.
  function size(bytes, unit = GIB) {
    const number = bytes / unit
    return number > 0 && number < 0.005 ? "<0.01" : withCommas(number, 2)
  }

  function withCommas(number, digits) {
    return number.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })
  }

  function short(number) {
    if (number > 0 && number < 0.01) return "<0.01"
    return withCommas(number, number >= 9.95 ? 0 : number >= 0.995 ? 1 : 2)
  }

  function amount(hours, perHour) {
    if (!hours) return "none"
    const range = hours.map(one => one * perHour)
    if (range[2] < 0.01) return "<0.01"
    const [low, likely, high] = range.map(short)
    return low === likely && likely === high ? likely : `${likely} (${low} to ${high})`
  }

  function phaseRows([phase, rows, parts], room, time, unit) {
    return parts.map(([part, peak, needed], place) => {
      const fits = element("td", needed <= room ? "yes" : "NO")
      if (needed > room) fits.className = "does-not-fit"
      const isFirst = place === 0
      const name = isFirst && part === "step" ? phase : `${isFirst ? `${phase}: ` : "of it "}${part}`
      const cells = [isFirst && rows ? String(rows) : "", size(peak, unit), size(needed, unit)].map(text => element("td", text))
      return element("tr", element("td", name), ...cells, fits, element("td", isFirst ? time(phase) : ""))
    })
  }

  function totalRow(label, time) {
    const cells = ["", "", "", ""].map(text => element("td", text))
    return element("tr", element("td", label), ...cells, element("td", time))
  }

  function show() {
    const device = choice.device.value
    const { usable_bytes: room, source } = CALCULATOR.devices[device]
    const found = experiment().settings[`${choice["batch-size"].value} ${choice.precision.value}`]
    const times = found.hours[device]
    const small = found.phases.every(([, , parts]) => parts.every(([, peak]) => peak < GIB))
    const [unit, name] = small ? [MIB, "MiB"] : [GIB, "GiB"]
    const longest = Math.max(...Object.values(times.phases).map(range => range ? range[2] : 0))
    const [perHour, ofTime] = longest >= 1 ? [1, "hours"] : [60, "min"]
    const head = element("tr", ...["phase", "rows", `peak ${name}`, `needed ${name}`, "fits", ofTime].map(text => element("th", text)))
    const body = found.phases.flatMap(phase => phaseRows(phase, room, name => amount(times.phases[name], perHour), unit))
    body.push(totalRow("in all, one seed", amount(times.seed, perHour)))
    if (found.seeds > 1) body.push(totalRow(`in all, ${found.seeds} seeds`, amount(times.all, perHour)))
    const table = element("table", element("thead", head), element("tbody", ...body))
    const wrapped = element("div", table)
    wrapped.className = "md-typeset__table"
    const scrolled = element("div", wrapped)
    scrolled.className = "md-typeset__scrollwrap"
    const all = found.phases.every(([, , parts]) => parts.every(([, , needed]) => needed <= room))
    const verdict = element("p", element("strong", all ? "It fits." : "It does not fit."), ` ${device}: ${size(room)} GiB usable (${source}).`)
    const told = [...found.failures, ...(found.missing[device] ?? [])].map(text => element("li", text))
    answer.replaceChildren(verdict, scrolled, ...(told.length ? [element("ul", ...told)] : []))
    answer.append(element("p", `Asked with ${CALCULATOR.made}.`))
  }

  function experiment() {
    return CALCULATOR.experiments[choice.experiment.value]
  }

  function offerSettings() {
    const { batch_size, configured, precisions, settings } = experiment()
    const sizes = [...new Set(Object.keys(settings).map(name => Number(name.split(" ")[0])))].sort((a, b) => a - b)
    offer(choice["batch-size"], sizes, batch_size)
    offer(choice.precision, precisions, precisions[0])
    choice.precision.options[0].text += ` (${configured.join(", ")})`
  }

  offer(choice.experiment, Object.keys(CALCULATOR.experiments), "mnist")
  offer(choice.device, Object.keys(CALCULATOR.devices), "T4")
  offerSettings()
  choice.experiment.addEventListener("change", offerSettings)
  for (const select of Object.values(choice)) select.addEventListener("change", show)
  document.getElementById("calculator").hidden = false
  show()
}

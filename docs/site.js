// Search over INDEX of search.js, which is loaded when somebody searches: [title, page, address, text, is it a public name].
const field = document.querySelector('#site-search'), results = document.querySelector('#site-results'), text = document.querySelector('#site-page')
const root = document.documentElement.dataset.root

function load() {
  load.done ??= new Promise((resolve, reject) => {
    const script = document.createElement('script')
    script.src = root + 'search.js'; script.onload = resolve; script.onerror = reject
    document.head.append(script)
  })
  return load.done
}

// Each word must occur; a title that is, begins with or holds the words comes first, then a public name, then where they stand often.
function find(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean), phrase = words.join(' ')
  const found = []
  for (const entry of INDEX) {
    const title = entry[0].toLowerCase(), text = entry[3].toLowerCase(), all = `${title} ${entry[1].toLowerCase()} ${text}`
    if (!words.every(word => all.includes(word))) continue
    const score = (title === phrase ? 100 : title.startsWith(phrase) ? 50 : words.every(w => title.includes(w)) ? 25 : 0)
      + (text.includes(phrase) ? 5 : 0) + (entry[4] ? 3 : 0) + Math.min(text.split(words[0]).length, 10) / 10
    found.push([score, entry])
  }
  return [words, found.sort((a, b) => b[0] - a[0])]
}

// Text nodes only: nothing of the index is read as HTML.
function snippet(text, words) {
  const first = Math.max(0, Math.min(...words.map(w => text.toLowerCase().indexOf(w)).filter(i => i >= 0), text.length) - 60)
  const escaped = words.map(w => w.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).sort((a, b) => b.length - a.length)
  const line = document.createElement('p')
  const parts = (first ? '… ' : '') + text.slice(first, first + 220)
  parts.split(new RegExp(`(${escaped.join('|')})`, 'i')).forEach((part, i) => {
    if (i % 2) { const mark = document.createElement('mark'); mark.textContent = part; line.append(mark) } else line.append(part)
  })
  return line
}

async function show() {
  const query = field.value.trim()
  results.hidden = !query; text.hidden = !!query
  if (!query) return
  await load()
  if (field.value.trim() !== query) return
  const [words, found] = find(query), list = document.createElement('ol')
  for (const [, [title, page, address, text]] of found.slice(0, 40)) {
    const item = document.createElement('li'), link = document.createElement('a')
    link.href = root + address; link.textContent = title
    link.onclick = () => { field.value = ''; show() }
    item.append(link, page === title ? '' : ` ${page}`, snippet(text, words)); list.append(item)
  }
  const heading = document.createElement('h1'), count = document.createElement('p')
  heading.textContent = 'Search'
  count.setAttribute('role', 'status')
  count.textContent = found.length ? `${found.length} places` : `Nothing holds “${query}”.`
  results.replaceChildren(heading, count, list); scrollTo(0, 0)
}

field.addEventListener('focus', load)
field.addEventListener('input', show)
field.addEventListener('keydown', event => {
  if (event.key === 'Escape') { field.value = ''; show() }
  if (event.key === 'Enter') results.querySelector('a')?.click()
})
document.addEventListener('keydown', event => {
  if (event.key === '/' && !event.target.closest('input, textarea')) { event.preventDefault(); field.focus() }
})
const contents = document.querySelector('#site-contents')
contents.addEventListener('click', event => { if (event.target.closest('a') && contents.matches(':popover-open')) contents.hidePopover() })
const here = contents.querySelector('[aria-current]')  // within the contents only: the page itself must not move
if (here) contents.scrollTop = here.offsetTop - 120

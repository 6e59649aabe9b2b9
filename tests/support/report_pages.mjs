// node report_pages.mjs NODE_MODULES CHROMIUM FOLDER PAGE …: see report_pages.py
import { readFileSync } from 'node:fs';
import { basename } from 'node:path';

const [modules, executablePath, folder, ...pages] = process.argv.slice(2);
const { chromium } = await import(`${modules}/playwright-core/index.mjs`);
const axe = readFileSync(`${modules}/axe-core/axe.min.js`, 'utf8');
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking'] });
const faults = [];
for (const path of pages)
  for (const colorScheme of ['light', 'dark'])
    for (const width of [1280, 360]) {
      const where = `${basename(path, '.html')}-${colorScheme}-${width}`;
      const fault = (text) => faults.push(`${where}: ${text}`);
      const context = await browser.newContext({ colorScheme, viewport: { width, height: 900 }, bypassCSP: true }); // for axe
      const page = await context.newPage();
      page.on('console', (message) => fault(`console: ${message.text()}`));
      page.on('pageerror', (error) => fault(`error: ${error}`));
      page.on('request', (request) => request.url() === `file://${path}` || fault(`loads ${request.url()}`));
      await page.goto(`file://${path}`);
      await page.screenshot({ path: `${folder}/${where}.png`, fullPage: true });
      const beyond = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      if (beyond > 0) fault(`${beyond} pixels wider than the window`);
      await page.evaluate((code) => { document.querySelectorAll('details').forEach((each) => { each.open = true; }); eval(code); }, axe);
      const { violations } = await page.evaluate(() => axe.run());
      for (const { id, nodes } of violations) fault(`axe: ${id}: ${nodes[0].html}`);
      await context.close();
    }
await browser.close();
console.log(faults.length ? faults.join('\n') : `${4 * pages.length} views, nothing found`);
process.exit(faults.length ? 1 : 0);

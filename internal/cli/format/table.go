// Package format prints what lists and inspections give: aligned tables, Go
// templates with Docker's field names, JSON lines. The command line imports it.
//
// A kind of row says its fields once, as Columns; tables take their headings and
// templates their fields from it.
package format

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/template"
	"unicode/utf8"
)

// Column is a field of a row: its name in templates, its heading, its text. One
// whose name begins in lower case is for the default table alone.
type Column[T any] struct {
	Name, Heading string
	Text          func(T) string
}

// List prints rows.
type List[T any] struct {
	Columns []Column[T]
	// Table names the columns that are shown by default, in order.
	Table []string
	// Labels gives a row's labels, for {{.Label "name"}}; nil for none.
	Labels func(T) map[string]string
	// Quiet is the column that is shown alone with -q.
	Quiet string
}

// Options say how to print.
type Options struct {
	// Template is "", "table", "json", "table TEMPLATE" or "TEMPLATE".
	Template string
	Quiet    bool
}

// Print prints the rows.
func (l *List[T]) Print(w io.Writer, rows []T, o Options) error {
	t := o.Template
	switch {
	case o.Quiet && (t == "" || t == "table"):
		for _, r := range rows {
			if _, err := fmt.Fprintln(w, l.text(l.Quiet, r)); err != nil {
				return err
			}
		}
		return nil
	case t == "" || t == "table":
		return l.table(w, rows, l.Table)
	case t == "json":
		for _, r := range rows {
			if err := l.json(w, r); err != nil {
				return err
			}
		}
		return nil
	}
	src, aligned := strings.CutPrefix(t, "table ")
	tmpl, err := Parse(src)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if aligned {
		if err := tmpl.Execute(&out, l.headings()); err != nil {
			return templateError(err)
		}
		out.WriteByte('\n')
	}
	for _, r := range rows {
		if err := tmpl.Execute(&out, l.fields(r)); err != nil {
			return templateError(err)
		}
		out.WriteByte('\n')
	}
	if aligned {
		var lines [][]string
		for _, line := range strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n") {
			lines = append(lines, strings.Split(line, "\t"))
		}
		return Align(w, lines)
	}
	_, err = out.WriteTo(w)
	return err
}

func (l *List[T]) find(name string) *Column[T] {
	i := slices.IndexFunc(l.Columns, func(c Column[T]) bool { return c.Name == name })
	return &l.Columns[i]
}

func (l *List[T]) text(name string, r T) string { return l.find(name).Text(r) }

func (l *List[T]) table(w io.Writer, rows []T, names []string) error {
	lines := make([][]string, 0, len(rows)+1)
	cols := make([]*Column[T], len(names))
	head := make([]string, len(names))
	for i, n := range names {
		cols[i] = l.find(n)
		head[i] = cols[i].Heading
	}
	lines = append(lines, head)
	for _, r := range rows {
		line := make([]string, len(cols))
		for i, c := range cols {
			line[i] = c.Text(r)
		}
		lines = append(lines, line)
	}
	return Align(w, lines)
}

func (l *List[T]) headings() headings {
	h := headings{}
	for _, c := range l.Columns {
		h[c.Name] = c.Heading
	}
	return h
}

// row is what a template sees: fields by name, and a method. Labels hide under
// a name that no field can have.
type row map[string]any

const labelsKey = ""

// Label is the value of a label, "" when the object has it not.
func (r row) Label(name string) string {
	labels, _ := r[labelsKey].(map[string]string)
	return labels[name]
}

// MarshalJSON leaves the labels' hiding place out.
func (r row) MarshalJSON() ([]byte, error) {
	m := make(map[string]any, len(r))
	for k, v := range r {
		if k != labelsKey {
			m[k] = v
		}
	}
	b, err := marshal(m)
	return bytes.TrimSuffix(b, []byte("\n")), err
}

func (l *List[T]) fields(r T) row {
	m := make(row, len(l.Columns)+1)
	for _, c := range l.Columns {
		if c.Name[0] < 'a' {
			m[c.Name] = c.Text(r)
		}
	}
	if l.Labels != nil {
		m[labelsKey] = l.Labels(r)
	}
	return m
}

func (l *List[T]) json(w io.Writer, r T) error {
	b, err := marshal(l.fields(r)) // sorted by name
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// headings stands for a row in a template that makes a heading.
type headings map[string]string

// Label is the heading of a column made of one label: its last word.
func (headings) Label(name string) string {
	if i := strings.LastIndexByte(name, '.'); i >= 0 {
		name = name[i+1:]
	}
	return strings.ToUpper(strings.NewReplacer("-", " ", "_", " ").Replace(name))
}

// Align prints lines of cells in columns, three blanks apart; nothing pads the
// last cell.
func Align(w io.Writer, lines [][]string) error {
	const gap = 3
	var width []int
	for _, l := range lines {
		for i, c := range l {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	var b bytes.Buffer
	for _, l := range lines {
		for i, c := range l {
			b.WriteString(c)
			if i < len(l)-1 {
				for range width[i] - utf8.RuneCountInString(c) + gap {
					b.WriteByte(' ')
				}
			}
		}
		b.WriteByte('\n')
	}
	_, err := b.WriteTo(w)
	return err
}

// JSONLines prints values, one a line.
func JSONLines[T any](w io.Writer, rows []T) error {
	for _, r := range rows {
		b, err := marshal(r)
		if err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// marshal is compact JSON with a newline, with <, > and & as they are.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return b.Bytes(), err
}

// Parse reads a template; \t and \n written out are taken for what they mean.
func Parse(src string) (*template.Template, error) {
	src = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(src)
	t, err := template.New("format").Option("missingkey=error").Funcs(functions()).Parse(src)
	if err != nil {
		return nil, templateError(err)
	}
	return t, nil
}

func templateError(err error) error {
	return fmt.Errorf("cannot use the format: %s", strings.TrimPrefix(err.Error(), "template: "))
}

func functions() template.FuncMap {
	return template.FuncMap{
		"json": func(v any) (string, error) {
			b, err := marshal(v)
			return strings.TrimSuffix(string(b), "\n"), err
		},
		"split":    strings.Split,
		"join":     join,
		"title":    title,
		"lower":    strings.ToLower,
		"upper":    strings.ToUpper,
		"pad":      pad,
		"truncate": truncate,
		"println":  func(a ...any) string { return fmt.Sprintln(a...) },
	}
}

func join(list any, sep string) (string, error) {
	switch l := list.(type) {
	case []string:
		return strings.Join(l, sep), nil
	case []any:
		parts := make([]string, len(l))
		for i, v := range l {
			parts[i] = fmt.Sprint(v)
		}
		return strings.Join(parts, sep), nil
	case nil:
		return "", nil
	case string:
		return l, nil
	}
	return "", fmt.Errorf("join wants a list, not %T", list)
}

func title(s string) string {
	up := true
	return strings.Map(func(r rune) rune {
		was := up
		up = r == ' ' || r == '\t' || r == '\n'
		if was {
			return []rune(strings.ToUpper(string(r)))[0]
		}
		return r
	}, s)
}

func pad(s string, before, after int) string {
	if s == "" {
		return s
	}
	return strings.Repeat(" ", max(0, before)) + s + strings.Repeat(" ", max(0, after))
}

func truncate(s string, n int) string {
	if n >= 0 && utf8.RuneCountInString(s) > n {
		return string([]rune(s)[:n])
	}
	return s
}

// Object prints one object by a template, "" or "json" as JSON. Raw is the JSON
// it came from, for fields that the type lacks.
func Object(w io.Writer, v any, raw []byte, tmpl string) error {
	if raw == nil {
		var err error
		if raw, err = json.Marshal(v); err != nil {
			return err
		}
	}
	if tmpl == "json" {
		var b bytes.Buffer
		if err := json.Compact(&b, raw); err != nil {
			return err
		}
		b.WriteByte('\n')
		_, err := b.WriteTo(w)
		return err
	}
	t, err := Parse(tmpl)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		var generic any
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		if d.Decode(&generic) != nil {
			return templateError(err)
		}
		b.Reset()
		if t.Execute(&b, generic) != nil {
			return templateError(err)
		}
	}
	b.WriteByte('\n')
	_, err = b.WriteTo(w)
	return err
}

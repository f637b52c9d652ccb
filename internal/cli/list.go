package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

// listFlags are the options that every list has.
type listFlags struct {
	filters  []string
	format   string
	json     bool
	quiet    bool
	noTrunc  bool
	fromFile string // the configuration's format, used when none is given
}

func (o *listFlags) declare(f *command.FlagSet, trunc bool) {
	f.Strings(&o.filters, "filter", "f", "Show those that match, key=value").Kind("filter")
	o.declareFormat(f)
	f.Bool(&o.quiet, "quiet", "q", "Show ids or names only")
	if trunc {
		f.Bool(&o.noTrunc, "no-trunc", "", "Do not shorten")
	}
}

func (o *listFlags) declareFormat(f *command.FlagSet) {
	f.String(&o.format, "format", "", "Print by a Go template; 'table TEMPLATE' with headings, 'json' as JSON")
	f.Bool(&o.json, "json", "", "Print the API's objects as JSON, one a line")
}

// template is the format to use.
func (o *listFlags) template() string {
	if o.format == "" {
		return o.fromFile
	}
	return o.format
}

func (o *listFlags) options() format.Options {
	return format.Options{Template: o.template(), Quiet: o.quiet}
}

// readFilters makes filters of key=value.
func readFilters(list []string) (client.Filters, error) {
	f := client.Filters{}
	for _, s := range list {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, usagef("cannot use the filter %q: write key=value", s)
		}
		f.Add(strings.ToLower(strings.TrimSpace(k)), strings.TrimSpace(v))
	}
	return f, nil
}

// labelText renders labels as Docker does: k=v, sorted, by commas.
func labelText(m map[string]string) string {
	list := make([]string, 0, len(m))
	for k, v := range m {
		list = append(list, k+"="+v)
	}
	slices.Sort(list)
	return strings.Join(list, ",")
}

// trunc shortens an id unless told not to.
func trunc(id string, no bool) string {
	if no {
		return id
	}
	return short(id)
}

// yesNo asks and reports whether the answer is yes. Without a terminal it is no.
func (a *App) yesNo(question string) (bool, error) {
	a.out.Flush()
	fmt.Fprintf(a.Stderr, "%s [y/N] ", question)
	line, err := readLine(a.Stdin)
	if err != nil && line == "" {
		fmt.Fprintln(a.Stderr)
		return false, nil
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return true, nil
	}
	return false, nil
}

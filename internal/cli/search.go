package cli

import (
	"context"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

func (a *App) cmdSearch() *command.Command {
	var o listFlags
	limit := 0
	return &command.Command{Name: "search", Args: "[REGISTRY/]TERM", Short: "Search Docker Hub, or a registry that can be searched", Min: 1, Max: 1,
		Example: `servin search --filter is-official=true --limit 5 nginx`,
		Flags: func(f *command.FlagSet) {
			o.declareFormat(f)
			f.Strings(&o.filters, "filter", "f", "Show those that match: is-official=true, stars=N").Kind("filter")
			f.Int(&limit, "limit", "", "Show so many at most, 1 to 100 (default 25)")
			f.Bool(&o.noTrunc, "no-trunc", "", "Do not shorten")
		},
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			auth, err := a.auth(ctx, searchedRegistry(args[0]))
			if err != nil {
				return err
			}
			list, err := c.ImageSearch(ctx, args[0], limit, filters, auth)
			if err != nil {
				return err
			}
			if o.json {
				return format.JSONLines(a.out, list)
			}
			return searchColumns(o.noTrunc).Print(a.out, list, o.options())
		}}
}

// searchedRegistry is a name whose registry is the one that is searched.
func searchedRegistry(term string) string {
	if first, _, ok := strings.Cut(term, "/"); ok && (strings.ContainsAny(first, ".:") || first == "localhost") {
		return first + "/x"
	}
	return "x"
}

func searchColumns(noTrunc bool) *format.List[registry.SearchResult] {
	type R = registry.SearchResult
	official := func(r R) string {
		if r.IsOfficial {
			return "[OK]"
		}
		return ""
	}
	return &format.List[R]{
		Quiet: "Name", Table: []string{"Name", "Description", "StarCount", "IsOfficial"},
		Columns: []format.Column[R]{
			{Name: "Name", Heading: "NAME", Text: func(r R) string { return r.Name }},
			{Name: "Description", Heading: "DESCRIPTION", Text: func(r R) string {
				d := strings.NewReplacer("\n", " ", "\r", " ", "\t", " ").Replace(r.Description)
				if !noTrunc {
					d = format.Ellipsis(d, 45)
				}
				return d
			}},
			{Name: "StarCount", Heading: "STARS", Text: func(r R) string { return strconv.Itoa(r.StarCount) }},
			{Name: "IsOfficial", Heading: "OFFICIAL", Text: official},
			// There are none any more; formats written for Docker may ask.
			{Name: "IsAutomated", Heading: "AUTOMATED", Text: func(R) string { return "" }},
		}}
}

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/image"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

// imageRow is one name of an image.
type imageRow struct {
	image.Summary
	repo, tag, digest string
}

const none = "<none>"

func (a *App) cmdImages() *command.Command {
	var o listFlags
	var all, digests bool
	return &command.Command{Name: "ls", Aliases: []string{"list"}, Args: "[REPOSITORY[:TAG]]", Short: "List images", Max: 1, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			o.declare(f, true)
			f.Bool(&all, "all", "a", "Show intermediate images too")
			f.Bool(&digests, "digests", "", "Show digests")
			tree := false
			f.Bool(&tree, "tree", "", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				filters.Add("reference", args[0])
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			lo := client.ImageListOptions{All: all, Filters: filters}
			if o.json {
				raw, err := c.ImageListRaw(ctx, lo)
				if err != nil {
					return err
				}
				return format.JSONLines(a.out, raw)
			}
			o.fromFile = a.cfg.ImagesFormat
			t := o.template()
			lo.Shared = strings.Contains(t, ".SharedSize") || strings.Contains(t, ".UniqueSize")
			list, err := c.ImageList(ctx, lo)
			if err != nil {
				return err
			}
			digests = digests || strings.Contains(t, ".Digest")
			rows := imageRows(list, digests)
			if o.quiet {
				rows = slices.CompactFunc(rows, func(x, y imageRow) bool { return x.ID == y.ID })
			}
			return imageColumns(o.noTrunc, digests, time.Now()).Print(a.out, rows, o.options())
		}}
}

// imageRows makes a row of each name, newest image first.
func imageRows(list []image.Summary, digests bool) []imageRow {
	slices.SortStableFunc(list, func(a, b image.Summary) int { return cmp.Compare(b.Created, a.Created) })
	var rows []imageRow
	for _, im := range list {
		digestOf := map[string]string{}
		for _, d := range im.RepoDigests {
			name, digest, _ := strings.Cut(d, "@")
			digestOf[name] = digest
		}
		n := len(rows)
		named := map[string]bool{}
		for _, t := range im.RepoTags {
			repo, tag := client.SplitTag(t)
			if repo == none {
				continue
			}
			named[repo] = true
			rows = append(rows, imageRow{im, repo, tag, pick(digestOf[repo], none)})
		}
		for _, d := range im.RepoDigests { // pulled by digest: a row without a tag
			name, digest, _ := strings.Cut(d, "@")
			if !named[name] && name != none && (digests || len(rows) == n) {
				named[name] = true
				rows = append(rows, imageRow{im, name, none, digest})
			}
		}
		if len(rows) == n {
			rows = append(rows, imageRow{im, none, none, none})
		}
	}
	return rows
}

func imageColumns(noTrunc, digests bool, now time.Time) *format.List[imageRow] {
	type R = imageRow
	l := &format.List[R]{
		Quiet:  "ID",
		Labels: func(r R) map[string]string { return r.Summary.Labels },
		Table:  []string{"Repository", "Tag", "ID", "CreatedSince", "Size"},
		Columns: []format.Column[R]{
			{Name: "ID", Heading: "IMAGE ID", Text: func(r R) string { return trunc(r.Summary.ID, noTrunc) }},
			{Name: "Repository", Heading: "REPOSITORY", Text: func(r R) string { return r.repo }},
			{Name: "Tag", Heading: "TAG", Text: func(r R) string { return r.tag }},
			{Name: "Digest", Heading: "DIGEST", Text: func(r R) string { return r.digest }},
			{Name: "CreatedSince", Heading: "CREATED", Text: func(r R) string { return format.Ago(time.Unix(r.Created, 0), now) }},
			{Name: "CreatedAt", Heading: "CREATED AT", Text: func(r R) string { return time.Unix(r.Created, 0).String() }},
			{Name: "Size", Heading: "SIZE", Text: func(r R) string { return format.Size(r.Summary.Size) }},
			{Name: "Containers", Heading: "CONTAINERS", Text: func(r R) string {
				return unknown(r.Containers, func(n int64) string { return strconv.FormatInt(n, 10) })
			}},
			{Name: "VirtualSize", Heading: "SIZE", Text: func(r R) string { return format.Size(r.Summary.Size) }},
			{Name: "SharedSize", Heading: "SHARED SIZE", Text: func(r R) string { return unknown(r.Summary.SharedSize, format.Size) }},
			{Name: "UniqueSize", Heading: "UNIQUE SIZE", Text: func(r R) string {
				if r.Summary.SharedSize < 0 {
					return "N/A"
				}
				return format.Size(r.Summary.Size - r.Summary.SharedSize)
			}},
		},
	}
	if digests {
		l.Table = []string{"Repository", "Tag", "Digest", "ID", "CreatedSince", "Size"}
	}
	return l
}

func unknown(n int64, text func(int64) string) string {
	if n < 0 {
		return "N/A"
	}
	return text(n)
}

func (a *App) cmdPull() *command.Command {
	var po client.PullOptions
	quiet, jsonOut := false, false
	return &command.Command{Name: "pull", Args: "NAME[:TAG|@DIGEST]", Short: "Fetch an image from a registry", Min: 1, Max: 1, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&po.AllTags, "all-tags", "a", "Fetch every tag of the repository")
			f.String(&po.Platform, "platform", "", "The image for this platform, os/arch[/variant]").Of("platform")
			f.Bool(&po.Lazy, "lazy", "", "Fetch files as they are read, where the image's format allows (eStargz, zstd:chunked)")
			f.Bool(&quiet, "quiet", "q", "Show the name only")
			f.Bool(&jsonOut, "json", "", "Print progress as JSON, one message a line")
		},
		Run: func(ctx context.Context, args []string) error {
			name, tag := client.SplitTag(args[0])
			if po.AllTags && tag != "" {
				return usagef("--all-tags and a tag exclude each other")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if jsonOut {
				if po.Auth, err = a.auth(ctx, args[0]); err != nil {
					return err
				}
				return c.ImagePull(ctx, args[0], po, a.jsonProgress)
			}
			if !quiet && tag == "" && !po.AllTags {
				fmt.Fprintln(a.Stdout, "Using default tag: latest")
			}
			if err := a.pull(ctx, c, args[0], po, quiet, a.Stdout); err != nil {
				return err
			}
			if tag == "" && !po.AllTags {
				tag = "latest"
			}
			fmt.Fprintln(a.out, fullName(name, tag))
			return nil
		}}
}

// jsonProgress prints messages as they are.
func (a *App) jsonProgress(m client.Progress) error {
	return format.JSONLines(a.Stdout, []client.Progress{m})
}

// fullName spells an image's name out: docker.io/library/alpine:latest.
func fullName(name, tag string) string {
	first, _, ok := strings.Cut(name, "/")
	switch {
	case !ok:
		name = "docker.io/library/" + name
	case !strings.ContainsAny(first, ".:") && first != "localhost" && strings.ToLower(first) == first:
		name = "docker.io/" + name
	}
	switch {
	case tag == "":
		return name
	case strings.Contains(tag, ":"):
		return name + "@" + tag
	}
	return name + ":" + tag
}

func (a *App) cmdPush() *command.Command {
	var po client.PushOptions
	quiet := false
	return &command.Command{Name: "push", Args: "NAME[:TAG]", Short: "Send an image to a registry", Min: 1, Max: 1, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&po.AllTags, "all-tags", "a", "Send every tag of the image")
			f.String(&po.Platform, "platform", "", "The image for this platform only, os/arch[/variant]").Of("platform")
			f.Bool(&quiet, "quiet", "q", "Show the name only")
		},
		Run: func(ctx context.Context, args []string) error {
			name, tag := client.SplitTag(args[0])
			if po.AllTags && tag != "" {
				return usagef("--all-tags and a tag exclude each other")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if po.Auth, err = a.auth(ctx, args[0]); err != nil {
				return err
			}
			if quiet {
				if err := c.ImagePush(ctx, args[0], po, nil); err != nil {
					return err
				}
				fmt.Fprintln(a.out, fullName(name, pick(tag, "latest")))
				return nil
			}
			p := a.progress(a.Stdout)
			err = c.ImagePush(ctx, args[0], po, p.Show)
			return errors.Join(p.Flush(), err)
		}}
}

func (a *App) cmdTag() *command.Command {
	return &command.Command{Name: "tag", Args: "IMAGE[:TAG] NEW_NAME[:TAG]", Short: "Give an image another name", Min: 2, Max: 2, Complete: []string{"image"},
		Run: func(ctx context.Context, args []string) error {
			if strings.Contains(args[1], "@") {
				return fmt.Errorf("cannot tag %s: a name to give has no digest", args[1])
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			repo, tag := client.SplitTag(args[1])
			return c.ImageTag(ctx, args[0], repo, tag)
		}}
}

func (a *App) cmdRmi() *command.Command {
	var o client.ImageRemoveOptions
	return &command.Command{Name: "rm", Aliases: []string{"remove"}, Args: "IMAGE [IMAGE...]", Short: "Remove images", Min: 1, Max: -1, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Force, "force", "f", "Remove an image that stopped containers use, too")
			f.Bool(&o.NoPrune, "no-prune", "", "Keep untagged parents")
			f.Strings(&o.Platforms, "platform", "", "Remove this platform of the image only").Of("platform")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			var errs []error
			for _, n := range args {
				list, err := c.ImageRemove(ctx, n, o)
				for _, d := range list {
					if d.Deleted != "" {
						fmt.Fprintln(a.out, "Deleted:", d.Deleted)
					} else {
						fmt.Fprintln(a.out, "Untagged:", d.Untagged)
					}
				}
				if o.Force && client.IsNotFound(err) {
					fmt.Fprintln(a.Stderr, "servin:", err)
				} else if err != nil {
					errs = append(errs, err)
				}
			}
			return joined(errs)
		}}
}

func (a *App) cmdHistory() *command.Command {
	var o listFlags
	human, platform := true, ""
	return &command.Command{Name: "history", Args: "IMAGE", Short: "Show the steps that made an image", Min: 1, Max: 1, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			o.declareFormat(f)
			f.Bool(&o.quiet, "quiet", "q", "Show ids only")
			f.Bool(&o.noTrunc, "no-trunc", "", "Do not shorten")
			f.Bool(&human, "human", "H", "Show sizes and dates for people")
			f.String(&platform, "platform", "", "The image for this platform, os/arch[/variant]").Of("platform")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.ImageHistory(ctx, args[0], platform)
			if err != nil {
				return err
			}
			if o.json {
				return format.JSONLines(a.out, list)
			}
			return historyColumns(o.noTrunc, human, time.Now()).Print(a.out, list, o.options())
		}}
}

func historyColumns(noTrunc, human bool, now time.Time) *format.List[image.HistoryResponseItem] {
	type R = image.HistoryResponseItem
	stamp := func(r R) string { return time.Unix(r.Created, 0).Format(time.RFC3339) }
	return &format.List[R]{
		Quiet: "ID", Table: []string{"ID", "CreatedSince", "CreatedBy", "Size", "Comment"},
		Columns: []format.Column[R]{
			{Name: "ID", Heading: "IMAGE", Text: func(r R) string { return trunc(r.ID, noTrunc) }},
			{Name: "CreatedSince", Heading: "CREATED", Text: func(r R) string {
				if !human {
					return stamp(r)
				}
				return format.Ago(time.Unix(r.Created, 0), now)
			}},
			{Name: "CreatedAt", Heading: "CREATED AT", Text: stamp},
			{Name: "CreatedBy", Heading: "CREATED BY", Text: func(r R) string {
				s := strings.ReplaceAll(r.CreatedBy, "\t", " ")
				if !noTrunc {
					s = format.Ellipsis(s, 45)
				}
				return s
			}},
			{Name: "Size", Heading: "SIZE", Text: func(r R) string {
				if !human {
					return strconv.FormatInt(r.Size, 10)
				}
				return format.Size(r.Size)
			}},
			{Name: "Comment", Heading: "COMMENT", Text: func(r R) string { return r.Comment }},
		}}
}

package driver

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"regexp"
	"strings"
	"text/template"
	"time"
	"unicode"
)

// Container is what a record may say about its container. The field and method
// names are those that tag templates of Docker's users name.
type Container struct {
	ContainerID         string
	ContainerName       string // with its slash, as Docker has it
	ContainerEntrypoint string
	ContainerArgs       []string
	ContainerImageID    string
	ContainerImageName  string
	ContainerCreated    time.Time
	ContainerEnv        []string
	ContainerLabels     map[string]string
	LogPath             string
	DaemonName          string
}

const shortLen = 12

func shorten(s string) string { return s[:min(len(s), shortLen)] }

// ID is the short id.
func (c Container) ID() string { return shorten(c.ContainerID) }

// FullID is the id.
func (c Container) FullID() string { return c.ContainerID }

// Name is the name without its slash.
func (c Container) Name() string { return strings.TrimPrefix(c.ContainerName, "/") }

// ImageID is the image's short id.
func (c Container) ImageID() string { return shorten(c.ContainerImageID) }

// ImageFullID is the image's id.
func (c Container) ImageFullID() string { return c.ContainerImageID }

// ImageName is the image as it was asked for.
func (c Container) ImageName() string { return c.ContainerImageName }

// Hostname is the host's name.
func (c Container) Hostname() (string, error) { return os.Hostname() }

// Command is the process that runs.
func (c Container) Command() string {
	return strings.Join(append([]string{c.ContainerEntrypoint}, c.ContainerArgs...), " ")
}

// maxTag bounds what a template may produce.
const maxTag = 4096

var errTagLong = errors.New("the tag is longer than 4096 bytes")

type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxTag {
		return 0, errTagLong
	}
	return b.Buffer.Write(p)
}

// Tag renders the option tag, or the given default where there is none.
func (c Container) Tag(o map[string]string, otherwise string) (string, error) {
	text := o["tag"]
	if text == "" {
		text = otherwise
	}
	if !strings.Contains(text, "{{") {
		return text, nil
	}
	t, err := parseTag(text)
	if err != nil {
		return "", err
	}
	var b bounded
	if err := t.Execute(&b, c); err != nil {
		return "", invalid("invalid log tag: %w", err)
	}
	return b.String(), nil
}

func parseTag(text string) (*template.Template, error) {
	t, err := template.New("log-tag").Funcs(template.FuncMap{
		"json": func(v any) string {
			b, _ := json.Marshal(v)
			return string(b)
		},
		"split": strings.Split, "join": strings.Join, "lower": strings.ToLower, "upper": strings.ToUpper,
		"title": func(s string) string {
			if s == "" {
				return s
			}
			r := []rune(s)
			r[0] = unicode.ToTitle(r[0])
			return string(r)
		},
		"truncate": func(s string, n int) string {
			if n < 0 || len(s) <= n {
				return s
			}
			return s[:n]
		},
		"pad": func(s string, before, after int) string {
			if s == "" {
				return s
			}
			sp := func(n int) string { return strings.Repeat(" ", min(max(n, 0), maxTag)) }
			return sp(before) + s + sp(after)
		},
	}).Parse(text)
	if err != nil {
		return nil, invalid("invalid log tag: %w", err)
	}
	return t, nil
}

// checkAttrs finds what could never work.
func checkAttrs(o map[string]string) error {
	for _, k := range []string{"labels-regex", "env-regex"} {
		if _, err := regexp.Compile(o[k]); err != nil {
			return invalid("invalid value for %s: %w", k, err)
		}
	}
	if strings.Contains(o["tag"], "{{") {
		_, err := parseTag(o["tag"])
		return err
	}
	return nil
}

// Attrs are the labels and variables that the options name. The form of the
// names is changed by rename, if given.
func (c Container) Attrs(o map[string]string, rename func(string) string) map[string]string {
	m := map[string]string{}
	put := func(k, v string) {
		if rename != nil {
			k = rename(k)
		}
		m[k] = v
	}
	add := func(list, pattern string, has map[string]string) {
		if list != "" {
			for k := range strings.SplitSeq(list, ",") {
				if v, ok := has[k]; ok && k != "" {
					put(k, v)
				}
			}
		}
		if pattern == "" {
			return
		}
		if re, err := regexp.Compile(pattern); err == nil {
			for k, v := range has {
				if re.MatchString(k) {
					put(k, v)
				}
			}
		}
	}
	add(o["labels"], o["labels-regex"], c.ContainerLabels)
	if o["env"] != "" || o["env-regex"] != "" {
		env := make(map[string]string, len(c.ContainerEnv))
		for _, v := range c.ContainerEnv {
			if k, val, ok := strings.Cut(v, "="); ok {
				env[k] = val
			}
		}
		add(o["env"], o["env-regex"], env)
	}
	return m
}

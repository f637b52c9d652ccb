package driver

import (
	"regexp"
	"strings"
	"time"
)

// Container is what a record may say about its container. Tags name what is in fields.
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

// checkAttrs finds what could never work.
func checkAttrs(o map[string]string) error {
	for _, k := range []string{"labels-regex", "env-regex"} {
		if _, err := regexp.Compile(o[k]); err != nil {
			return invalid("invalid value for %s: %w", k, err)
		}
	}
	if strings.Contains(o["tag"], "{{") {
		return checkTag(o["tag"])
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

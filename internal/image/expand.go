package image

import "strings"

// Expand replaces $NAME, ${NAME}, ${NAME:-default} and ${NAME:+other} in an
// argument of a Dockerfile instruction by what env says. A backslash takes the
// meaning from a dollar sign, as single quotes do; both stay, for who splits the
// argument into words afterwards. What is put in is made safe for that: outside
// quotes it stays one word.
func Expand(s string, env []string) string {
	if !strings.Contains(s, "$") {
		return s
	}
	var b strings.Builder
	var quote byte
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'' && i+1 < len(s):
			if s[i+1] != '$' {
				b.WriteByte(c)
			}
			i++
			b.WriteByte(s[i])
			continue
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		}
		if c != '$' || quote == '\'' {
			b.WriteByte(c)
			continue
		}
		name, op, word, n := variable(s[i+1:])
		if n == 0 {
			b.WriteByte(c)
			continue
		}
		i += n
		v, set := lookupEnv(env, name)
		switch {
		case op == '-' && v == "":
			v = Expand(word, env)
		case op == '+' && set && v != "":
			v = Expand(word, env)
		case op == '+':
			v = ""
		}
		writeSafe(&b, v, quote)
	}
	return b.String()
}

// variable reads what follows a dollar sign; n is how long it is, 0 for none.
func variable(s string) (name string, op byte, word string, n int) {
	if !strings.HasPrefix(s, "{") {
		for n < len(s) && nameByte(s[n], n) {
			n++
		}
		return s[:n], 0, "", n
	}
	end := strings.IndexByte(s, '}')
	if end < 0 {
		return "", 0, "", 0
	}
	in := s[1:end]
	name, rest, has := strings.Cut(in, ":")
	for i := range len(name) {
		if !nameByte(name[i], i) {
			return "", 0, "", 0
		}
	}
	if name == "" || has && (rest == "" || rest[0] != '-' && rest[0] != '+') {
		return "", 0, "", 0
	}
	if has {
		op, word = rest[0], rest[1:]
	}
	return name, op, word, end + 1
}

func nameByte(c byte, at int) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || at > 0 && c >= '0' && c <= '9'
}

func lookupEnv(env []string, name string) (string, bool) {
	for i := len(env) - 1; i >= 0; i-- {
		if k, v, _ := strings.Cut(env[i], "="); k == name {
			return v, true
		}
	}
	return "", false
}

func writeSafe(b *strings.Builder, v string, quote byte) {
	special := "\\\"' \t"
	if quote == '"' {
		special = "\\\""
	}
	for i := range len(v) {
		if strings.IndexByte(special, v[i]) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(v[i])
	}
}

// ExpandFor expands the argument of a Dockerfile instruction, if that may name
// variables.
func ExpandFor(instruction, arg string, env []string) string {
	switch instruction {
	case "ENV", "LABEL":
		return Expand(arg, env)
	case "EXPOSE", "USER", "WORKDIR", "VOLUME", "STOPSIGNAL":
		// These take no quotes: what Expand escapes for words is taken back.
		return strings.NewReplacer(`\\`, `\`, `\ `, " ", `\"`, `"`, `\'`, "'", "\\\t", "\t").Replace(Expand(arg, env))
	}
	return arg
}

package dockerapi

import (
	"net/http"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// handler serves one route. What it returns as an error becomes the response,
// unless the response has begun.
type handler func(w *response, r *request) error

// route is one line of the route table. A pattern has at most one variable:
// {name} stands for anything, slashes too (image names have them), {id} for
// anything but a slash. Where a second one ends the pattern, the handler gets
// both with what stands between them, and cuts there.
type route struct {
	method  string
	pattern string
	since   version // 0: always
	handle  handler
}

// compiled is a route whose pattern was cut at its variable.
type compiled struct {
	route
	prefix, suffix string
	greedy         bool
	between        string // of two variables
}

// router finds routes by method and path.
type router struct {
	exact map[string]*compiled   // method + path
	vars  map[string][]*compiled // method + first path element; longest suffix first
}

func newRouter(table []route) *router {
	rt := &router{exact: make(map[string]*compiled, len(table)), vars: make(map[string][]*compiled)}
	for _, r := range table {
		c := &compiled{route: r}
		open := strings.IndexByte(r.pattern, '{')
		if open < 0 {
			rt.exact[r.method+r.pattern] = c
			continue
		}
		end := strings.IndexByte(r.pattern, '}')
		c.prefix, c.suffix = r.pattern[:open], r.pattern[end+1:]
		c.greedy = r.pattern[open+1:end] == "name"
		if at := strings.IndexByte(c.suffix, '{'); at >= 0 {
			c.between = c.suffix[:at]
		}
		key := r.method + firstElement(r.pattern)
		rt.vars[key] = append(rt.vars[key], c)
	}
	for _, l := range rt.vars {
		slices.SortStableFunc(l, func(a, b *compiled) int { return len(b.suffix) - len(a.suffix) })
	}
	return rt
}

// find returns the route and the value of its variable.
func (rt *router) find(method, path string) (*compiled, string) {
	if c, ok := rt.exact[method+path]; ok {
		return c, ""
	}
	for _, c := range rt.vars[method+firstElement(path)] {
		if c.between != "" {
			rest, ok := strings.CutPrefix(path, c.prefix)
			first, second, both := strings.Cut(strings.TrimPrefix(rest, "/"), c.between)
			if ok && both && first != "" && second != "" && !strings.Contains(first+second, "/") {
				return c, first + c.between + second
			}
			continue
		}
		if len(path) <= len(c.prefix)+len(c.suffix) || !strings.HasPrefix(path, c.prefix) || !strings.HasSuffix(path, c.suffix) {
			continue
		}
		name := path[len(c.prefix) : len(path)-len(c.suffix)]
		if c.greedy && c.prefix == "/containers/" {
			name = strings.TrimPrefix(name, "/")
		}
		if !c.greedy {
			// "/containers//web/json": names were once shown with their slash.
			name = strings.TrimPrefix(name, "/")
			if name == "" || strings.IndexByte(name, '/') >= 0 {
				continue
			}
		}
		return c, name
	}
	return nil, ""
}

// firstElement of "/containers/x/json" is "/containers".
func firstElement(path string) string {
	if len(path) == 0 {
		return path
	}
	if i := strings.IndexByte(path[1:], '/'); i >= 0 {
		return path[:i+1]
	}
	return path
}

// checkName refuses what can be neither a name, an id nor a reference, before
// it reaches a log or an error text.
func checkName(name string) error {
	if len(name) > 1024 {
		return fault.New(fault.Invalid, "invalid name: longer than 1024 bytes")
	}
	for i := 0; i < len(name); i++ {
		if name[i] < ' ' || name[i] == 0x7f {
			return fault.New(fault.Invalid, "invalid name: it holds a control character")
		}
	}
	return nil
}

var errNoPage = fault.New(fault.NotFound, "page not found")

// optionsOK answers an OPTIONS request for any path, as Docker does.
func optionsOK(w http.ResponseWriter) { w.WriteHeader(http.StatusOK) }

package interop

import (
	gobuild "go/build"
	"go/importer"
	"go/token"
	"go/types"
	"slices"
	"strings"
	"testing"
)

// importers keep what they have read of the standard library, for each system.
var importers = make(map[string]types.Importer)

// surface returns a line for each exported thing of a package that a program
// can see: objects, fields, methods, and their types.
func surface(t *testing.T, path string) []string {
	t.Helper()
	gobuild.Default.CgoEnabled = false // for the importer, which would run cgo for net
	if importers[gobuild.Default.GOOS] == nil {
		importers[gobuild.Default.GOOS] = importer.ForCompiler(token.NewFileSet(), "source", nil)
	}
	pkg, err := importers[gobuild.Default.GOOS].Import(path)
	if err != nil {
		t.Fatal(err)
	}
	qualify := func(p *types.Package) string {
		// Package testing refers to the one above it.
		for _, lib := range []string{theirPath, ourPath} {
			if rest, ok := strings.CutPrefix(p.Path(), lib); ok {
				return "tableflip" + rest
			}
		}
		return p.Path()
	}
	var list []string
	for _, name := range pkg.Scope().Names() {
		o := pkg.Scope().Lookup(name)
		if !o.Exported() {
			continue
		}
		list = append(list, types.ObjectString(signature(o), qualify))
		if c, ok := o.(*types.Const); ok {
			list = append(list, name+" is "+c.Val().String())
		}
		tn, ok := o.(*types.TypeName)
		if !ok {
			continue
		}
		for _, typ := range []types.Type{tn.Type(), types.NewPointer(tn.Type())} {
			set := types.NewMethodSet(typ)
			for i := range set.Len() {
				if m := set.At(i); m.Obj().Exported() {
					list = append(list, types.TypeString(typ, qualify)+" has "+m.Obj().Name()+" "+types.TypeString(unnamed(m.Type().(*types.Signature)), qualify))
				}
			}
		}
		if s, ok := tn.Type().Underlying().(*types.Struct); ok {
			for i := range s.NumFields() {
				if f := s.Field(i); f.Exported() {
					list = append(list, name+" has the field "+types.ObjectString(f, qualify)+embedded(f))
				}
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func embedded(f *types.Var) string {
	if f.Embedded() {
		return " (embedded)"
	}
	return ""
}

// signature returns o as far as a caller can tell: without what is unexported,
// and without the names of parameters.
func signature(o types.Object) types.Object {
	switch o := o.(type) {
	case *types.Func:
		return types.NewFunc(0, o.Pkg(), o.Name(), unnamed(o.Type().(*types.Signature)))
	case *types.TypeName:
		if _, ok := o.Type().Underlying().(*types.Struct); ok {
			return types.NewTypeName(0, o.Pkg(), o.Name(), types.NewStruct(nil, nil))
		}
	case *types.Var:
		return types.NewVar(0, o.Pkg(), o.Name(), o.Type())
	}
	return o
}

// unnamed returns a signature without the names of what it takes and returns.
func unnamed(s *types.Signature) *types.Signature {
	tuple := func(t *types.Tuple) *types.Tuple {
		var vars []*types.Var
		for i := range t.Len() {
			typ := t.At(i).Type()
			if f, ok := typ.(*types.Signature); ok {
				typ = unnamed(f)
			}
			vars = append(vars, types.NewVar(0, nil, "", typ))
		}
		return types.NewTuple(vars...)
	}
	return types.NewSignatureType(nil, nil, nil, tuple(s.Params()), tuple(s.Results()), s.Variadic())
}

func TestSurface(t *testing.T) {
	added := []string{"func tableflip.Inherit(github.com/ecdysis-go/ecdysis.Options) (*github.com/ecdysis-go/ecdysis.Upgrader, error)"}
	for _, c := range []struct {
		path  string
		least int // as many as one must see, so that a blind look is noticed
		added []string
	}{{"", 50, added}, {"/testing", 20, nil}} {
		want, got := surface(t, theirPath+c.path), surface(t, ourPath+c.path)
		if len(want) < c.least {
			t.Errorf("%s%s has %d exported things; want %d or more", theirPath, c.path, len(want), c.least)
		}
		for _, s := range want {
			if !slices.Contains(got, s) {
				t.Errorf("%s%s has not: %s", ourPath, c.path, s)
			}
		}
		for _, s := range got {
			if !slices.Contains(want, s) && !slices.Contains(c.added, s) {
				t.Errorf("%s%s has what the other has not: %s", ourPath, c.path, s)
			}
		}
		for _, s := range c.added {
			if !slices.Contains(got, s) {
				t.Errorf("%s%s has not: %s", ourPath, c.path, s)
			}
		}
	}
}

// TestOtherSystems compares what package ecdysis exports on systems that cannot
// hand sockets on, and are not tested otherwise, with what it exports here.
func TestOtherSystems(t *testing.T) {
	const path = "github.com/ecdysis-go/ecdysis"
	on := func(system string) []string {
		defer func(s string) { gobuild.Default.GOOS = s }(gobuild.Default.GOOS)
		gobuild.Default.GOOS = system
		return surface(t, path)
	}
	want, got := on("linux"), on("windows")
	if len(want) < 150 {
		t.Errorf("it exports %d things on Linux; want 150 or more", len(want))
	}
	for _, s := range want {
		if !slices.Contains(got, s) {
			t.Errorf("on Windows there is not: %s", s)
		}
	}
	for _, s := range got {
		if !slices.Contains(want, s) {
			t.Errorf("on Windows alone there is: %s", s)
		}
	}
}
